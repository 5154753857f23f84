"""The kernel tables against the installed xDiT: every backend and function that they name exists there."""

from __future__ import annotations

import inspect

import pytest
import torch

from wan_mlperf.errors import BadInput
from wan_mlperf.kernels import attention
from wan_mlperf.kernels.device import Device
from wan_mlperf.parallel import xdit
from wan_mlperf.recipe import Attention


def device(arch: str) -> Device:
    return Device(arch=arch, name=arch, torch=torch.device("cpu" if arch == "cpu" else "cuda"))


def present(_backend: str) -> None:
    return None


def test_every_backend_exists_in_xdit() -> None:
    xdit.load()
    from xfuser.core.distributed.attention_backend import AttentionBackendType

    named = {backend for by_arch in attention.BACKENDS.values() for backends in by_arch.values() for backend in backends}
    assert len(named) > 8
    assert named <= set(AttentionBackendType.__members__)


def test_every_function_has_the_signature_that_is_called() -> None:
    xdit.load()
    from xfuser.core.distributed import parallel_state
    from xfuser.model_executor.layers import usp
    from xfuser.model_executor.layers.mxfp4_linear import xFuserMXFP4Linear

    assert {"backend", "attention_kwargs"} <= set(inspect.signature(usp.USP).parameters)
    assert {"backend", "attention_kwargs"} <= set(inspect.signature(usp.attention).parameters)
    assert "valid_kv_len" in inspect.getsource(usp)
    assert list(inspect.signature(xFuserMXFP4Linear).parameters) == ["in_features", "out_features", "bias", "device", "dtype"]
    assert list(inspect.signature(xFuserMXFP4Linear.load_and_quantize_weights).parameters) == ["self", "weights", "bias"]
    wanted = {"data_parallel_degree", "classifier_free_guidance_degree", "ulysses_degree", "ring_degree", "use_parallel_vae"}
    assert wanted <= set(inspect.signature(parallel_state.initialize_model_parallel).parameters)


def test_the_recipes_names_are_the_tables() -> None:
    names = set(inspect.get_annotations(Attention, eval_str=True)["early"].__args__)
    assert names == set(attention.BACKENDS) == set(attention.NEEDS)


@pytest.mark.parametrize(
    ("name", "arch", "backend"),
    [
        ("sdpa", "gfx950", "AITER"),
        ("sage_fp8", "gfx950", "AITER_FP8"),
        ("sage_fp4", "gfx950", "AITER_SAGE_V2"),
        ("sdpa", "sm90", "FLASH_3"),
        ("sage_fp8", "sm90", "FLASH_3_FP8"),
        ("sage_fp4", "sm100", "FLASH_4_FP4"),
        ("sdpa", "sm86", "FLASH"),
        ("sdpa", "cpu", "SDPA"),
    ],
)
def test_names_mean_on_a_device(name: str, arch: str, backend: str) -> None:
    assert attention.resolve([name], device(arch), allow_reference=False, probe=present)[name].xdit == backend


def test_the_next_best_backend_is_taken() -> None:
    table = attention.resolve(
        ["sdpa"], device("sm90"), allow_reference=False, probe=lambda one: "gone" if "FLASH" in one else None
    )
    assert table["sdpa"].xdit == "CUDNN"


@pytest.mark.parametrize("arch", ["cpu", "sm90", "gfx942"])
def test_fp4_is_refused_where_it_cannot_run(arch: str) -> None:
    with pytest.raises(BadInput, match=rf"attention 'sage_fp4': cannot run on {arch} .*AITER.*gfx950"):
        attention.check(["sage_fp4"], device(arch), allow_reference=False)
    table = attention.resolve(["sage_fp4"], device(arch), allow_reference=True, probe=present)
    assert table["sage_fp4"].is_reference


def test_what_xdit_misses_is_said() -> None:
    with pytest.raises(BadInput, match=r"AITER_SAGE_V2: please update AITER"):
        attention.resolve(["sage_fp4"], device("gfx950"), allow_reference=False, probe=lambda _one: "please update AITER")


def test_ring_refuses_references() -> None:
    with pytest.raises(BadInput, match="log-sum-exp"):
        attention.resolve(["sage_fp4"], device("cpu"), allow_reference=True, probe=present, ring=2)
