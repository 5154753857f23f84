"""Sage attention against a plain implementation written here, for any number of tokens, tile and shard.

B batch, H heads, T tokens, D head dim.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wan_mlperf.kernels import sage

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def plain_attention(q: Tensor, k: Tensor, v: Tensor, v_scales: Tensor, offset: float) -> Tensor:
    """All scores at once in float64; tile by tile of keys a running maximum, float8 by PyTorch's own cast."""
    scores = q.double() @ k.double().mT
    maximum = torch.full_like(scores[..., :1], -torch.inf)
    total, out = torch.zeros_like(maximum), torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for start in range(0, k.shape[-2], 64):
        tile = scores[..., start : start + 64]
        new = torch.maximum(maximum, tile.amax(-1, keepdim=True))
        p, decay = torch.exp2(tile - new + offset), torch.exp2(maximum - new)
        rounded = p.float().to(torch.float8_e4m3fn).double()
        total, out = (
            total * decay + p.sum(-1, keepdim=True),
            out * decay + rounded @ v[..., start : start + 64, :].double(),
        )
        maximum = new
    return out / total * v_scales.double()


def plain_fp4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = sage.dequantise_mxfp4(*sage.quantise_mxfp4(sage.rotate(q, sage.LOG2_E * q.shape[-1] ** -0.5)))
    k = sage.dequantise_mxfp4(*sage.quantise_mxfp4(sage.smooth(sage.rotate(k))))
    v_scales = v.abs().amax(-2, keepdim=True) / 448
    return plain_attention(q, k, (v / v_scales).to(torch.float8_e4m3fn).float(), v_scales, 0.0)


def plain_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tensors = (sage.rotate(q), sage.smooth(sage.rotate(k)), v)
    scales = [(x.abs().amax((-2, -1), keepdim=True) / 448).clamp(min=1e-30) for x in tensors]
    q, k, v = ((x / scale).to(torch.float8_e4m3fn).float() for x, scale in zip(tensors, scales, strict=True))
    return plain_attention(q * scales[0] * scales[1] * q.shape[-1] ** -0.5 * sage.LOG2_E, k, v, scales[2], 8.0)


KERNELS = pytest.mark.parametrize(
    ("kernel", "plain"), [(sage.sage_fp4, plain_fp4), (sage.sage_fp8, plain_fp8)], ids=["fp4", "fp8"]
)


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
def test_a_head_does_not_depend_on_the_others(kernel: Attention, plain: Attention, dtype: torch.dtype) -> None:
    """What Ulysses relies on: a shard of the heads gives that shard of the result. Strides are diffusers'."""
    q, k, v = (x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in random_inputs(2, 6, 100, 32))
    v[:, 5] *= 1000  # a scale that spanned heads would show
    shard = slice(2, 4)
    out = kernel(q, k, v)
    assert out.shape == q.shape and out.dtype == dtype
    assert relative_error(kernel(q[:, shard], k[:, shard], v[:, shard]), out[:, shard]) < 1e-5


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
