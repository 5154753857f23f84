"""The kernel table against the installed xDiT, and against packages of right, wrong and old signatures (stand_ins.py)."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from typing import Any, get_args

import pytest
import torch

from tests.conftest import ROOT
from wan_mlperf.errors import BadInput
from wan_mlperf.kernels import attention, probe
from wan_mlperf.kernels.backends import ARCHS, ATTENTION, CANDIDATES, GEMM, GEMM_CANDIDATES, NEEDS
from wan_mlperf.kernels.device import Device
from wan_mlperf.kernels.numerics import SIXTEEN_BITS
from wan_mlperf.kernels.reference import reference
from wan_mlperf.parallel import xdit
from wan_mlperf.recipe import Attention, Gemm
from wan_mlperf.recipe.parts import Arch


def device(arch: str) -> Device:
    return Device(arch=arch, name=arch, torch=torch.device("cpu" if arch == "cpu" else "cuda"))


def test_every_backend_exists_in_xdit() -> None:
    xdit.load()
    from xfuser.core.distributed.attention_backend import AttentionBackendType

    assert {backend.xdit for backend in ATTENTION.values()} <= set(AttentionBackendType.__members__)
    listed = {key for by_arch in CANDIDATES.values() for keys in by_arch.values() for key in keys}
    assert listed == set(ATTENTION)  # each is some name's on some architecture


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
    assert names == set(CANDIDATES)
    formats = set(inspect.get_annotations(Gemm, eval_str=True)["high_noise"].__args__)
    assert formats == set(GEMM_CANDIDATES) and names | (formats - {"bf16"}) == set(NEEDS)
    assert set(ARCHS) == set(get_args(Arch))
    assert {arch for by_arch in CANDIDATES.values() for arch in by_arch} - {"gpu", "cpu"} == set(ARCHS)


def test_every_low_precision_text_says_what_its_entry_says() -> None:
    for key, backend in ATTENTION.items():
        text, numerics = backend.numerics.text, backend.numerics
        assert ("mean over the tokens" in text) == numerics.smoothed, key
        assert ("Hadamard" in text) == numerics.rotated, key
        assert ("per tensor" in text) == (numerics.qk_scales == "tensor"), key
        assert ("quantised" in text) == (numerics == SIXTEEN_BITS), key


PIP = "amd-aiter of PyPI"
FEBRUARY = "aiter of february 2026"
CUDNN = 91500
# Machine -> what each name takes there, or a part of the line that refuses it.
CASES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "MI355X": (
        {"arch": "gfx950", "packages": ["aiter"]},
        {
            "sdpa": "AITER",
            "sage_fp8": "AITER_FP8",
            "sage_fp4": "AITER_MXFP4",
            "native cross": "AITER",
            "fp8": "TORCHAO_FP8",
            "mxfp4": "AITER_A4W4",
        },
    ),
    "MI355X, smoothed": (
        {"arch": "gfx950", "packages": ["aiter"], "smooth_k": True},
        {"sdpa": "AITER", "sage_fp8": "AITER_SAGE", "sage_fp4": "AITER_SAGE_V2"},
    ),
    "MI355X, a ring": (  # MHA v4 gives no log-sum-exp, by which a ring is merged
        {"arch": "gfx950", "packages": ["aiter"], "ring": 2},
        {"sdpa": "AITER", "sage_fp8": "AITER_SAGE", "sage_fp4": "AITER_SAGE_V2"},
    ),
    "MI355X, a ring, February": (
        {"arch": "gfx950", "packages": [FEBRUARY], "ring": 2},
        {"sage_fp8": "AITER_SAGE: .*missing .*return_lse", "sage_fp4": "AITER_SAGE_V2: .*missing .*return_lse"},
    ),
    "MI355X, February": (
        {"arch": "gfx950", "packages": [FEBRUARY]},
        {"sdpa": "AITER", "sage_fp8": "AITER_FP8_V3", "sage_fp4": "AITER_SAGE_V2", "mxfp4": "AITER_A4W4"},
    ),
    "MI355X, half of MHA v4": (
        {"arch": "gfx950", "packages": ["aiter with half of mha_v4"]},
        {"sage_fp8": "AITER_FP8_V3", "sage_fp4": "AITER_SAGE_V2"},
    ),
    "MI355X, PyPI's amd-aiter": (
        {"arch": "gfx950", "packages": [PIP]},
        {
            "sdpa": "AITER",
            "sage_fp8": "AITER_FP8: aiter.ops.mha_v4 is not installed; needs AITER from 17 August 2026.*"
            "AITER_FP8_V3: .*no argument q_descale; needs AITER from 28 November 2025.*AITER_SAGE: aiter.ops.triton",
            "sage_fp4": "AITER_MXFP4: .*17 August 2026.*AITER_SAGE_V2: .*24 February 2026",
            "mxfp4": "AITER_A4W4: aiter.gemm_a4w4 requires the argument out; needs AITER from 19 December 2025",
        },
    ),
    "MI355X, nothing": (
        {"arch": "gfx950", "packages": []},
        {
            "sdpa": "SDPA",
            "native cross": "SDPA",
            "sage_fp8": "aiter is not installed.*rocm/pytorch-xdit",
            "sage_fp4": "aiter is not installed",
            "fp8": "TORCHAO_FP8",
            "mxfp4": "aiter is not installed",
        },
    ),
    "MI355X, another head dimension": (
        {"arch": "gfx950", "packages": ["aiter"], "head_dim": 32},
        {"sage_fp8": "AITER_SAGE", "sage_fp4": "AITER_SAGE_V2"},
    ),
    "MI355X, float32": (
        {"arch": "gfx950", "packages": ["aiter"], "dtype": "float32"},
        {
            "sdpa": "SDPA",
            "sage_fp8": "AITER_FP8: takes bfloat16, and the model computes in float32",
            "sage_fp4": "AITER_SAGE_V2: takes bfloat16 or float16, and the model computes in float32",
            "fp8": "takes bfloat16, and the model computes in float32",
            "mxfp4": "takes bfloat16, and the model computes in float32",
        },
    ),
    "MI300X": (  # with MHA v4 xDiT's AITER_FP8 is a kernel that gfx942 does not have
        {"arch": "gfx942", "packages": ["aiter"]},
        {"sdpa": "AITER", "sage_fp8": "AITER_SAGE", "sage_fp4": "cannot run on gfx942", "mxfp4": "cannot run on gfx942"},
    ),
    "MI300X, February": ({"arch": "gfx942", "packages": [FEBRUARY]}, {"sage_fp8": "AITER_FP8_V3"}),
    "H100": (
        {"arch": "sm90", "packages": ["flash_attn_3", "sageattention"], "cudnn": CUDNN},
        {
            "sdpa": "FLASH_3",
            "native cross": "FLASH_3",
            "sage_fp8": "FLASH_3_FP8",
            "sage_fp4": "cannot run on sm90",
            "fp8": "TORCHAO_FP8",
        },
    ),
    "H100, smoothed": (
        {"arch": "sm90", "packages": ["flash_attn_3", "sageattention"], "smooth_k": True},
        {"sage_fp8": "SAGE"},
    ),
    "H100, an old FlashAttention 3": (
        {"arch": "sm90", "packages": ["flash_attn_3 of july 2025", "sageattention of PyPI"], "cudnn": CUDNN},
        {
            "sdpa": "CUDNN",
            "sage_fp8": "FLASH_3_FP8: .*no argument return_attn_probs; .*29 August 2025.*SAGE: .*no argument return_lse",
        },
    ),
    "H100, FlashAttention 2": ({"arch": "sm90", "packages": ["flash_attn"], "cudnn": 8900}, {"sdpa": "FLASH"}),
    "A100": ({"arch": "sm80", "packages": ["sageattention"]}, {"sage_fp8": "SAGE_FP16", "fp8": "cannot run on sm80"}),
    "B200": (
        {"arch": "sm100", "packages": ["flash_attn_4_fp4", "flashinfer"], "cudnn": CUDNN},
        {
            "sdpa": "FLASH_4",
            "native cross": "CUDNN",  # xDiT's FLASH_4 gives no log-sum-exp
            "sage_fp4": "FLASH_4_FP4",
            "sage_fp8": "cannot run on sm100",
            "mxfp4": "TORCHAO_MXFP4",
        },
    ),
    "B300": (
        {"arch": "sm103", "packages": ["flash_attn_4"], "cudnn": CUDNN},
        {"sdpa": "FLASH_4", "sage_fp4": "FLASH_4_FP4: .*no argument mSFQ; .*flash-attention-fp4", "mxfp4": "TORCHAO_MXFP4"},
    ),
    "B300, an old torchao": (
        {"arch": "sm103", "packages": ["an old torchao"]},
        {
            "fp8": "TORCHAO_FP8: torchao.quantization.*no argument activation_value_lb; needs torchao 0.18",
            "mxfp4": "TORCHAO_MXFP4: .* has no MXDynamicActivationMXWeightConfig; needs torchao 0.18",
        },
    ),
    "RTX PRO 6000": (
        {"arch": "sm120", "packages": ["sageattention"], "cudnn": CUDNN},
        {"sdpa": "CUDNN", "sage_fp8": "SAGE", "sage_fp4": "cannot run on sm120", "fp8": "TORCHAO_FP8"},
    ),
    "MI355X, PyPI's aiter": ({"arch": "gfx950", "packages": ["aiter of PyPI"]}, {"": "package aiter is not AITER"}),
    "B200, no FlashInfer": (
        {"arch": "sm100", "packages": ["flash_attn_4_fp4"]},
        {"": "xfuser cannot be imported here: No module named 'flashinfer'"},
    ),
}


@pytest.fixture(scope="module")
def asked() -> dict[str, Any]:
    """What xDiT's own probe and ours say on every machine."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.stand_ins"],
        input=json.dumps({name: case for name, (case, _) in CASES.items()}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


@pytest.mark.parametrize("machine", CASES)
def test_what_a_name_is_on_a_machine(asked: dict[str, Any], machine: str) -> None:
    answer, expected = asked[machine], CASES[machine][1]
    for name, wanted in expected.items():
        outcome = answer["names"][name] if name else answer
        if wanted in ATTENTION or wanted in GEMM:
            assert outcome.get("takes") == wanted, (name, outcome)
            assert name != "native cross" or outcome["lse"] != (wanted == "SDPA"), outcome
        else:
            assert re.search(wanted, outcome["refused"]), (name, outcome)
            assert "\n" not in outcome["refused"] and "allowed" in outcome["refused"]


def test_every_backend_was_taken_and_refused(asked: dict[str, Any]) -> None:
    """On some machine each is there; on another it is not, and what is needed is named."""
    answers = [answer["backends"] | answer["gemms"] for answer in asked.values() if "backends" in answer]
    for key in [*ATTENTION, *GEMM]:
        said = [answer[key] for answer in answers]
        assert None in said, key
        assert key in ("SDPA", "TORCH") or any(said), key
        assert all(one is None or re.search("needs|takes|instead|does not support ring|missing", one) for one in said), key


def test_what_was_passed_over_is_told(asked: dict[str, Any]) -> None:
    passed = asked["MI355X, half of MHA v4"]["names"]["sage_fp4"]["passed over"]
    assert len(passed) == 1 and passed[0].startswith("AITER_MXFP4: aiter.ops.mha_v4 has no quantize_mxfp8_k; needs AITER from")


def test_xdits_own_probe_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only xDiT knows: that its import did not find a package, and which backends it cannot merge in a ring."""
    xdit.load()
    from xfuser.core.distributed.runtime_state import RuntimeState

    assert "ring" in str(xdit.check_backend("SDPA", ring=2))
    monkeypatch.setattr(probe, "missing", lambda key, **_: None)  # as if all packages were there
    assert xdit.check_backend("FLASH_3") == "xDiT does not find it here (has_flash_attn_3 is False)"
    asked = []
    monkeypatch.setattr(
        RuntimeState, "_check_if_backend_compatible_with_current_configuration", lambda _, one: asked.append(one.name)
    )
    assert xdit.check_backend("CUDNN") is None and asked == ["CUDNN"]


@pytest.mark.parametrize("arch", ["cpu", "sm90", "gfx942"])
def test_fp4_is_refused_where_it_cannot_run(arch: str) -> None:
    with pytest.raises(BadInput, match=rf"attention 'sage_fp4': cannot run on {arch} .*AITER.*gfx950"):
        attention.check(["sage_fp4"], device(arch), references=None)
    attention.check(["sage_fp4"], device(arch), references="gfx950")


@pytest.mark.parametrize(
    ("references", "smooth_k", "fp8", "fp4"),
    [
        ("gfx950", False, "AITER_FP8", "AITER_MXFP4"),
        ("gfx950", True, "AITER_SAGE", "AITER_SAGE_V2"),
        ("sm90", False, "FLASH_3_FP8", None),
        ("sm100", False, None, "FLASH_4_FP4"),
    ],
)
def test_a_reference_stands_for_the_kernel_of_an_architecture(
    references: str, smooth_k: bool, fp8: str | None, fp4: str | None
) -> None:
    for name, key in (("sage_fp8", fp8), ("sage_fp4", fp4)):
        if key is None:
            with pytest.raises(
                BadInput, match=rf"attention '{name}': {references} has no kernel for it .*; allowed: references gfx950"
            ):
                attention.check([name], device("cpu"), references=references, smooth_k=smooth_k)
            continue
        table = attention.resolve([name], device("cpu"), references=references, probe=xdit.check_backend, smooth_k=smooth_k)
        assert table[name].is_reference and table[name].function is reference(ATTENTION[key].numerics)
        assert str(table[name]) == f"{key} by reference ({references})"


def test_ring_refuses_references() -> None:
    with pytest.raises(BadInput, match="log-sum-exp"):
        attention.resolve(["sage_fp4"], device("cpu"), references="gfx950", probe=xdit.check_backend, ring=2)
