"""The timing of parts, on a small model."""

from __future__ import annotations

import dataclasses

from wan_mlperf.bench import full_size
from wan_mlperf.kernels.device import probe
from wan_mlperf.workload import MLPERF


def test_parts_run_on_a_small_model() -> None:
    """The calls that a GPU times at full size, on this device at a small one."""
    small = dataclasses.replace(MLPERF, height=32, width=32, frames=5)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 64}
    calls = full_size.expert_calls(small, probe(), layers=1, **sizes)
    eager = {name: call for name, call in calls.items() if "compiled" not in name}
    assert set(eager) >= {"diffusers", "ours sdpa"}
    assert all(len(values) == 2 for values in full_size.alternate(eager, 2, probe()).values())
    decodes = full_size.vae_calls(small, probe(), chunks=(1,), base_dim=8, num_res_blocks=1)
    assert set(full_size.alternate(decodes, 1, probe())) == {"diffusers", "ours, chunk 1"}
