"""The references against a plain implementation written here, for each kernel's numerics and any number of tokens and tile.

B batch, H heads, T tokens, D head dim.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

from wan_mlperf.kernels import sage
from wan_mlperf.kernels.backends import ATTENTION
from wan_mlperf.kernels.numerics import Numerics
from wan_mlperf.kernels.reference import reference

Attention = Callable[..., Any]
LOW_PRECISION = [key for key, backend in ATTENTION.items() if backend.numerics != Numerics()]


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def random_inputs(*shape: int, keys: int = 0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian q, k, v [B, H, T, D] with channel offsets in K, as trained models have them."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*shape[:2], n, shape[3], generator=generator) for n in (shape[2], *[keys or shape[2]] * 2))
    return q, k + torch.randn(*shape[:2], 1, shape[3], generator=generator), v


def test_round_to_e4m3_is_the_cast() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, generator=generator) * torch.exp2(torch.randint(-14, 7, (200_000,), generator=generator))
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].unique()
    x = torch.cat([x.clamp(-448, 448), numbers, (numbers[1:] + numbers[:-1]) / 2])
    before = x.clone()
    assert torch.equal(sage.round_to_e4m3(x), x.to(torch.float8_e4m3fn).float())
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_to_mxfp4_is_quantise_then_dequantise(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 96, generator=generator) * torch.exp2(torch.randint(-9, 9, (64, 1, 96), generator=generator))
    ties = torch.tensor([6.0, *sage.E2M1_MIDPOINTS]).repeat(4)
    x[0, 0, :32], x[0, 1, :32], x[1, 0, :32], x[1, 1] = ties, -ties.nextafter(torch.zeros(())), ties * 2.0**-7, 0.0
    x = x.to(dtype)
    assert torch.equal(sage.dequantise_mxfp4(*sage.quantise_mxfp4(x)), sage.round_to_mxfp4(x))
    upward = torch.tensor([6.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]).repeat(4)
    assert torch.equal(sage.round_to_mxfp4(x)[0, 0, :32], upward)


def test_half_way_codes_go_to_the_even_one_where_the_hardware_converts() -> None:
    """As torchao's RCEIL, an independent implementation, has them."""
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    x[0, :32] = torch.tensor([6.0, *sage.E2M1_MIDPOINTS]).repeat(4)
    even = sage.round_to_mxfp4(x, ties_away=False)
    assert torch.equal(even, plain_operand(x, "mxfp4", "block", 0, "even"))
    assert even[0, :8].tolist() == [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, v_scales: Tensor, largest: float, dtype: torch.dtype) -> Tensor:
    """All scores at once in float64; tile by tile of keys a running maximum, probabilities by PyTorch's own casts."""
    scores = q.double() @ k.double().mT
    maximum = torch.full_like(scores[..., :1], -torch.inf)
    total, out = torch.zeros_like(maximum), torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for start in range(0, k.shape[-2], 64):
        tile = scores[..., start : start + 64]
        new = torch.maximum(maximum, tile.amax(-1, keepdim=True))
        p, decay = largest * torch.exp2(tile - new), torch.exp2(maximum - new)
        rounded = p.float().to(dtype).double()
        total, out = (
            total * decay + p.sum(-1, keepdim=True),
            out * decay + rounded @ v[..., start : start + 64, :].double(),
        )
        maximum = new
    return out / total * v_scales.double()


def plain_operand(x: Tensor, name: str, scales: str, group: int, ties: str) -> Tensor:
    """x in a format, by casts of PyTorch and torchao where there are any."""
    if name == "mxfp4" and ties == "away":
        return sage.dequantise_mxfp4(*sage.quantise_mxfp4(x))
    if name == "mxfp4":
        packed = to_mx(x.float().contiguous(), torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.RCEIL)
        return sage.dequantise_mxfp4(packed[1].view(torch.uint8), packed[0].view(torch.uint8).reshape(*x.shape[:-1], -1))
    if name == "nvfp4":
        scale, packed = nvfp4_quantize(x.float().flatten(0, -2), 16)
        ones = torch.full((*x.shape[:-1], x.shape[-1] // 32), 127, dtype=torch.uint8)
        codes = sage.dequantise_mxfp4(packed.view(torch.uint8).view(*x.shape[:-1], -1), ones)
        return codes * scale.float().reshape(*x.shape[:-1], -1).repeat_interleave(16, -1)
    if name == "int8":
        parts = []
        for part in x.float().split(group, dim=-2):
            scale = (part.abs().amax((-2, -1), keepdim=True) / 127).clamp(min=1e-30)
            halves_away = (part / scale).abs().add(0.5).floor() * part.sign()
            parts.append(halves_away * scale)
        return torch.cat(parts, -2)
    if name == "fp8":
        scale = (x.abs().amax((1, 2, 3) if scales == "tensor" else (2,), keepdim=True) / 448).float()
        return (x.float() / scale).to(torch.float8_e4m3fn).float() * scale
    return x.to(torch.float16 if name == "fp16" else torch.bfloat16).float()


def plain(key: str) -> Attention:
    """Attention with the numerics of a kernel, straight from its entry."""
    n = ATTENTION[key].numerics
    dtype = {"fp8": torch.float8_e4m3fn, "fp16": torch.float16, "16 bits": torch.bfloat16}[n.probabilities]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = sage.LOG2_E * q.shape[-1] ** -0.5
        first, last = (scale, 1.0) if n.qk == "mxfp4" else (1.0, scale)
        q, k = (sage.rotate(q, first), sage.rotate(k)) if n.rotated else (q * first, k)
        k = k - k.mean(-2, keepdim=True) if n.smoothed else k
        q = plain_operand(q, n.qk, n.qk_scales, n.groups[0], n.ties) * last
        k = plain_operand(k, n.qk, n.qk_scales, n.groups[1], n.ties)
        # What a scale multiplies may come before or after the products.
        return plain_attention(q, k, plain_operand(v, n.v, n.v_scales, 0, n.ties), torch.ones(()), n.largest, dtype)

    return attend


KERNELS = pytest.mark.parametrize(
    ("kernel", "plain"), [(reference(ATTENTION[key].numerics), plain(key)) for key in LOW_PRECISION], ids=LOW_PRECISION
)


@pytest.mark.parametrize("part", ["rotated", "smoothed", "v_scales", "qk", "probabilities"])
@pytest.mark.parametrize("key", LOW_PRECISION)
def test_a_reference_follows_each_part_of_its_entry(key: str, part: str) -> None:
    """With any one of them changed the outcome is another one, and no longer the plain implementation's."""
    n = ATTENTION[key].numerics
    q, k, v = random_inputs(1, 2, 197, 64)
    k[..., 3] *= 30  # an outlier, as trained models have them
    v[:, 1, 4] *= 9
    others: dict[str, Any] = {
        "v_scales": {"tensor": "channel", "channel": "tensor"}.get(n.v_scales),
        "qk": "int8" if n.qk == "fp8" else "fp8",
        "probabilities": "fp16" if n.probabilities == "fp8" else "fp8",
    }
    other = others.get(part, not getattr(n, part, None))
    if other is None:
        return  # this kernel has no such part
    changes: dict[str, Any] = {part: other}
    if part == "qk":
        changes |= {"qk_scales": "tokens", "groups": (64, 64)} if other == "int8" else {"qk_scales": "tensor"}
    changed = dataclasses.replace(n, **changes)
    whole = plain(key)(q, k, v)
    assert relative_error(reference(n)(q, k, v), whole) < 1e-3
    assert relative_error(reference(changed)(q, k, v), whole) > 1e-3


@KERNELS
@pytest.mark.parametrize(
    ("shape", "keys"),
    [
        ((1, 8, 80, 32), 80),
        ((2, 3, 197, 64), 197),
        ((1, 2, 65, 128), 65),
        ((1, 2, 64, 96), 64),
        ((1, 1, 1, 32), 1),
        ((1, 2, 80, 32), 23),
        ((2, 2, 7, 64), 333),
        ((1, 1, 130, 160), 512),
    ],
)
def test_any_number_of_tokens(kernel: Attention, plain: Attention, shape: tuple[int, ...], keys: int) -> None:
    """Divided by a tile or not, fewer than one, other keys than queries. What is left is float32 against float64."""
    q, k, v = random_inputs(*shape, keys=keys)
    assert relative_error(kernel(q, k, v), plain(q, k, v)) < 1e-3


@KERNELS
@pytest.mark.parametrize("budget", [1, 64 * 3 * 7, 64 * 3 * 64 * 2])
def test_tiles_do_not_matter(kernel: Attention, plain: Attention, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tiles sum in another order, no more: 1e-7, or 3e-4 where that rounds a probability to the next E4M3."""
    q, k, v = random_inputs(1, 3, 333, 64)
    whole = kernel(q, k, v)
    monkeypatch.setattr(sage, "CPU_SCORES", budget)
    assert relative_error(kernel(q, k, v), whole) < 1e-3


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_head_depends_on_the_others_by_scales_per_tensor_alone(
    kernel: Attention, plain: Attention, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """What Ulysses relies on: a shard of the heads gives that shard of the result. Strides are diffusers'."""
    q, k, v = (x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in random_inputs(2, 6, 100, 32))
    v[:, 5] *= 3000  # a scale that spans heads shows
    shard = slice(2, 4)
    out = kernel(q, k, v)
    assert out.shape == q.shape and out.dtype == dtype
    spans_heads = "tensor" in (n := ATTENTION[request.node.callspec.id.split("-")[-1]].numerics).qk_scales + n.v_scales
    assert (relative_error(kernel(q[:, shard], k[:, shard], v[:, shard]), out[:, shard]) < 1e-5) != spans_heads
    # Samples never share a scale.
    assert relative_error(kernel(q[:1], k[:1], v[:1]), out[:1]) < 1e-5


@KERNELS
def test_zeros_give_zeros(kernel: Attention, plain: Attention) -> None:
    assert torch.equal(kernel(*[torch.zeros(1, 2, 70, 32)] * 3), torch.zeros(1, 2, 70, 32))


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@KERNELS
def test_memory_is_bounded_by_tiles(kernel: Attention, plain: Attention) -> None:
    tokens = 4096
    q, k, v = random_inputs(1, 2, tokens, 32)
    with LargestTensor() as largest:
        kernel(q, k, v)
    assert q.numel() < largest.elements <= sage.CPU_SCORES < tokens * tokens


@pytest.mark.parametrize(("q", "k"), [((1, 2, 8, 48), (1, 2, 8, 48)), ((2, 8, 32), (2, 8, 32)), ((1, 2, 8, 32), (1, 1, 8, 32))])
@KERNELS
def test_wrong_shapes_are_named(kernel: Attention, plain: Attention, q: tuple[int, ...], k: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(.*, .*\)"):
        kernel(torch.ones(q), torch.ones(k), torch.ones(k))
