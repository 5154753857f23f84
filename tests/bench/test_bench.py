"""Figures from first principles against known ones, and the timing of single parts on a small model."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from wan_mlperf.bench import floor, full_size
from wan_mlperf.kernels.device import probe
from wan_mlperf.workload import MLPERF


def test_flops_of_one_video() -> None:
    """187 PFLOP of attention and 72 of GEMMs: the published count of this workload."""
    flops = floor.flops_of()
    assert floor.tokens_of(MLPERF) == 75_600
    assert flops.attention / 1e15 == pytest.approx(187, abs=0.5)
    assert flops.gemm / 1e15 == pytest.approx(72, abs=0.5)


def test_gemm_flops_against_a_counted_forward_pass() -> None:
    """The formula against PyTorch's own count of a small expert's forward pass."""
    from diffusers import WanTransformer3DModel
    from torch.utils.flop_counter import FlopCounterMode

    small = dataclasses.replace(MLPERF, height=64, width=64, frames=17, steps=1)
    model = floor.ExpertSize(width=64, ffn=128, layers=2, text_tokens=512)
    with torch.device("meta"):
        expert = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=32, ffn_dim=128, num_layers=2, text_dim=32)
        inputs = torch.empty(1, *small.latent_shape(16)), torch.empty(1), torch.empty(1, 512, 32)
    counted: list[int] = []
    counter = FlopCounterMode(display=False)
    for block in expert.blocks:
        block.register_forward_pre_hook(lambda *_: counted.append(-counter.get_total_flops()))
        block.register_forward_hook(lambda *_: counted.append(counter.get_total_flops()))
    with counter, torch.no_grad():
        expert(*inputs)
    flops = floor.flops_of(small, model)
    # The formula has both branches and the text's keys and values once per expert and branch; here is one pass.
    text = 4 * model.layers * 4 * model.text_tokens * model.width**2
    assert sum(counted) == (flops.gemm - text) / 2 + text / 4 + flops.attention / 2 + flops.cross_attention / 2


def test_the_floor_is_under_five_seconds() -> None:
    seconds = floor.floor_seconds()
    assert 4 < seconds["attention"] + seconds["gemm"] < 5
    assert sum(seconds.values()) < 6


def test_guidance_in_parallel_halves_what_ulysses_sends() -> None:
    together = floor.communication_of(MLPERF, cfg=1, ulysses=4)
    apart = floor.communication_of(MLPERF, cfg=2, ulysses=4)
    assert apart < 0.51 * together
    assert floor.communication_of(MLPERF, cfg=1, ulysses=1) == 0


def test_parts_run_on_a_small_model() -> None:
    """The calls that are timed at full size on a GPU, here at a small size on this device."""
    small = dataclasses.replace(MLPERF, height=32, width=32, frames=5)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 64}
    calls = full_size.expert_calls(small, probe(), layers=1, **sizes)
    eager = {name: call for name, call in calls.items() if "compiled" not in name}
    assert set(eager) >= {"diffusers", "ours sdpa"}
    assert all(len(values) == 2 for values in full_size.alternate(eager, 2, probe()).values())
    decodes = full_size.vae_calls(small, probe(), chunks=(1,), base_dim=8, num_res_blocks=1)
    assert set(full_size.alternate(decodes, 1, probe())) == {"diffusers", "ours, chunk 1"}
