"""Sage attention against outputs of AITER's own kernels.

B batch, H heads, T tokens, D head dim. `aiter_golden.safetensors` holds what AITER's quantisers and its FP4 attention
gave in Triton's interpreter with tiles of 64 x 64, for D 32, 64 and 128. Measured: every scale and every code is equal,
and the outputs are but for 0.4 %, the cast to bfloat16: the interpreter truncates, hardware rounds to nearest.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx

from wan_mlperf.kernels import sage
from wan_mlperf.kernels.backends import ATTENTION
from wan_mlperf.kernels.reference import reference

SAGE_V2, FP8 = (reference(ATTENTION[key].numerics) for key in ("AITER_SAGE_V2", "AITER_FP8"))
HEAD_DIMS = ("d32", "d64", "d128")
Quantiser = Callable[[Tensor], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(Path(__file__).with_name("aiter_golden.safetensors"))


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def cosine(value: Tensor, reference: Tensor) -> float:
    return float(cosine_similarity(value.double().flatten(), reference.double().flatten(), dim=0))


def nibbles(codes: Tensor) -> Tensor:
    return torch.stack([codes & 15, codes >> 4], -1)


def operands(golden: dict[str, Tensor], case: str) -> list[Tensor]:
    return [golden[f"{case}.{name}"] for name in ("q_codes", "q_scales", "k_codes", "k_scales", "v_fp8", "v_scales")]


def inputs(golden: dict[str, Tensor], case: str) -> list[Tensor]:
    return [golden[f"{case}.{name}"] for name in "qkv"]


# --- Against AITER


@pytest.mark.parametrize("case", HEAD_DIMS)
def test_fp4_from_golden_operands(golden: dict[str, Tensor], case: str) -> None:
    out = sage.sage_fp4_from_quantised(*operands(golden, case))
    assert out.dtype == torch.bfloat16
    assert relative_error(out, golden[f"{case}.out"]) < 0.01


@pytest.mark.parametrize("case", HEAD_DIMS)
def test_fp4_from_golden_operands_is_exact_before_the_cast(golden: dict[str, Tensor], case: str) -> None:
    """Cut to bfloat16 as Triton's interpreter cuts, all but a few values in 10,000 have the very bits."""
    out = sage.sage_fp4_from_quantised(*operands(golden, case), dtype=torch.float32)
    truncated = (out.view(torch.int32) & ~0xFFFF).view(torch.float32)
    assert (truncated != golden[f"{case}.out"].float()).float().mean() < 1e-3


@pytest.mark.parametrize("case", HEAD_DIMS)
def test_fp4_from_golden_inputs(golden: dict[str, Tensor], case: str) -> None:
    out = SAGE_V2(*inputs(golden, case))
    assert relative_error(out, golden[f"{case}.out"]) < 0.05
    assert cosine(out, golden[f"{case}.out"]) >= 0.999


def test_mxfp4_quantiser_alone(golden: dict[str, Tensor]) -> None:
    codes, scales = sage.quantise_mxfp4(golden["mxfp4.x"])
    assert torch.equal(scales, golden["mxfp4.scales"])
    assert torch.equal(codes, golden["mxfp4.codes"])


@pytest.mark.parametrize("case", HEAD_DIMS)
@pytest.mark.parametrize("name", ["q", "k"])
def test_golden_codes_from_golden_inputs(golden: dict[str, Tensor], case: str, name: str) -> None:
    x = golden[f"{case}.{name}"]
    x = sage.rotate(x, sage.LOG2_E * x.shape[-1] ** -0.5) if name == "q" else sage.smooth(sage.rotate(x))
    codes, scales = sage.quantise_mxfp4(x)
    assert torch.equal(scales, golden[f"{case}.{name}_scales"])
    assert (nibbles(codes) != nibbles(golden[f"{case}.{name}_codes"])).float().mean() <= 1e-3


@pytest.mark.parametrize("case", HEAD_DIMS)
def test_golden_v_and_hadamard(golden: dict[str, Tensor], case: str) -> None:
    v, scales = sage.quantise_e4m3(golden[f"{case}.v"], (-2,))
    assert torch.equal(v, golden[f"{case}.v_fp8"].float())
    assert torch.equal(scales.squeeze(-2), golden[f"{case}.v_scales"])
    block = golden[f"{case}.hadamard"]
    assert torch.equal(sage.hadamard(block.shape[0], block.dtype, block.device), block)


# --- Each piece matters: the same composition, one piece at a time taken out


def torchao_mxfp4(mode: ScaleCalculationMode) -> Quantiser:
    def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
        scales, codes = to_mx(x.float().contiguous(), torch.float4_e2m1fn_x2, sage.MX_BLOCK, mode)
        return codes.view(torch.uint8), scales.view(torch.uint8).reshape(*x.shape[:-1], -1)

    return quantise


def composed_fp4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rotation: bool = True,
    smoothing: bool = True,
    quantise: Quantiser = sage.quantise_mxfp4,
) -> Tensor:
    scale = sage.LOG2_E * q.shape[-1] ** -0.5
    q, k = (sage.rotate(q, scale), sage.rotate(k)) if rotation else (q * scale, k)
    values, v_scales = sage.quantise_e4m3(v, (-2,))
    return sage.sage_fp4_from_quantised(
        *quantise(q), *quantise(sage.smooth(k) if smoothing else k), values, v_scales.squeeze(-2), dtype=v.dtype
    )


@pytest.mark.parametrize("case", HEAD_DIMS)
def test_composition_is_the_reference(golden: dict[str, Tensor], case: str) -> None:
    assert torch.equal(composed_fp4(*inputs(golden, case)), SAGE_V2(*inputs(golden, case)))


@pytest.mark.parametrize("case", HEAD_DIMS)
@pytest.mark.parametrize(
    "change",
    [
        {"rotation": False},
        {"smoothing": False},
        *[{"quantise": torchao_mxfp4(mode)} for mode in ScaleCalculationMode if mode != ScaleCalculationMode.RCEIL],
    ],
    ids=["rotation", "smoothing", *[mode.name for mode in ScaleCalculationMode if mode != ScaleCalculationMode.RCEIL]],
)
def test_without_one_piece_the_golden_test_fails(golden: dict[str, Tensor], case: str, change: dict[str, Any]) -> None:
    """Measured: without rotation 23 to 25 %, without smoothing 21 %; FLOOR 11 to 13 %, EVEN 7 to 8 %, CEIL 17 %."""
    out = composed_fp4(*inputs(golden, case), **change)
    assert relative_error(out, golden[f"{case}.out"]) > 0.05
    assert cosine(out, golden[f"{case}.out"]) < 0.999


def test_torchao_rceil_differs_in_ties_only(golden: dict[str, Tensor]) -> None:
    x = golden["mxfp4.x"]
    codes, scales = sage.quantise_mxfp4(x)
    other_codes, other_scales = torchao_mxfp4(ScaleCalculationMode.RCEIL)(x)
    assert torch.equal(scales, other_scales)
    power = torch.exp2(scales.double() - 127).repeat_interleave(sage.MX_BLOCK, -1)
    magnitude = (x.double() / power).abs()
    differs = (nibbles(codes) != nibbles(other_codes)).flatten(-2)
    ties = torch.isin(magnitude, torch.tensor(sage.E2M1_MIDPOINTS, dtype=torch.float64))
    assert differs.any() and bool((ties | ~differs).all())


@pytest.mark.parametrize("case", HEAD_DIMS)
def test_fp8_is_near_exact_and_nearer_than_fp4(golden: dict[str, Tensor], case: str) -> None:
    q, k, v = inputs(golden, case)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    fp8 = relative_error(FP8(q, k, v), exact)
    assert fp8 < 0.06
    assert fp8 < relative_error(SAGE_V2(q, k, v), exact)
