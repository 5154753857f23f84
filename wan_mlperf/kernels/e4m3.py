"""Q, K and V as they cross between ranks in `exchange: fp8`: E4M3 with one scale per sample, head and sending rank.

The scale is a power of two and travels in the same message as one more row of bytes. So a message has one byte per value, and
what arrives is exactly what was rounded: bfloat16 and float32 hold every E4M3 number times every such scale. E4M3 is a
floating-point format, so a power of two rounds as well as amax / 448 would, except for values below 2^-14 of the head's largest.
It also rounds nearly alike whichever share of the tokens a rank holds.

T tokens of the sending rank, D head dim; leading dimensions have a scale each.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from wan_mlperf.kernels.sage import E4M3_MAX, power_of_two

WITHOUT_TRITON = ("sm80", "sm86")  # their Triton has no E4M3, so compiled code has none either


def missing(arch: str, *, compiled: bool) -> str | None:
    """What an architecture lacks for `exchange: fp8`, in one phrase."""
    return "torch.compile has no E4M3 on it" if compiled and arch in WITHOUT_TRITON else None


def pack(x: torch.Tensor) -> torch.Tensor:
    """Round x [..., T, D] to E4M3: bytes [..., T + 1, D], whose last row is the scale's exponent as in E8M0. NaN stays NaN."""
    wide = _wide(x.dtype)
    amax = torch.linalg.vector_norm(x, math.inf, dim=(-2, -1), keepdim=True)
    scale = power_of_two(amax.float() / E4M3_MAX)
    values = (x.to(wide) * torch.where(scale == 0, 0.0, 1 / scale).to(wide)).to(torch.float8_e4m3fn).view(torch.uint8)
    exponent = (scale.view(torch.int32) >> 23).to(torch.uint8)
    return torch.cat([values, exponent.expand(*x.shape[:-2], 1, x.shape[-1])], dim=-2)


def unpack(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes [..., T + 1, D] of `pack` -> what they stand for, [..., T, D]."""
    scale = (packed[..., -1:, :1].to(torch.int32) << 23).view(torch.float32)
    wide = _wide(dtype)
    return (packed[..., :-1, :].view(torch.float8_e4m3fn).to(wide) * scale.to(wide)).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    # Multiplying by a power of two is exact while the exponent fits: float16 has too few exponents.
    return torch.float32 if dtype == torch.float16 else dtype


def as_sent(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """What x [..., all tokens, D] becomes if `ranks` ranks, each with its share of the tokens, exchange it."""
    tokens = x.shape[-2]
    share = -(-tokens // ranks)
    shares = F.pad(x, (0, 0, 0, share * ranks - tokens)).unflatten(-2, (ranks, share))
    return unpack(pack(shares), x.dtype).flatten(-3, -2)[..., :tokens, :]
