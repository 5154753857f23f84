"""PyTorch references for the low-precision attention kernels, each made from its kernel's numerics (backends.py).

B batch, H heads, T tokens, D head dim. Quantised operands are stored as the float32 numbers that they represent (sage.py).

A scale "per tensor" covers the heads that a rank holds, as on a GPU, so its roundings depend on the Ulysses degree. Here it
covers one sample, while a GPU that makes several samples at once (`offline.batch`) has one scale for all of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from wan_mlperf.kernels import sage
from wan_mlperf.kernels.numerics import Format, Numerics, Scales

# (query, key, value) -> output, or (output, log-sum-exp of the logits) for ring attention.
Function = Callable[[Tensor, Tensor, Tensor], "Tensor | tuple[Tensor, Tensor]"]
SAMPLE = (-3, -2, -1)  # heads, tokens, head dim


@functools.cache
def reference(numerics: Numerics) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return attention with these numerics: q [B, H, Tq, D], k, v [B, H, Tk, D], D a multiple of 32 -> q's shape and dtype."""
    # Plain values, because torch.compile reads what a function closes over.
    n = numerics
    rotated, smoothed, ties_away = n.rotated, n.smoothed, n.ties == "away"
    qk, qk_scales, v_format, v_scales_of, largest = n.qk, n.qk_scales, n.v, n.v_scales, math.log2(n.largest)
    (q_group, k_group), probabilities = n.groups, n.probabilities

    @torch.no_grad()
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        check(q, k, v)
        scale = sage.LOG2_E * q.shape[-1] ** -0.5
        # MXFP4's codes depend on what comes before them, so its kernels scale Q first; the others scale the logits.
        first, last = (scale, 1.0) if qk == "mxfp4" else (1.0, scale)
        queries = sage.rotate(q, first) if rotated else q * first
        keys = sage.rotate(k) if rotated else k
        keys = sage.smooth(keys) if smoothed else keys
        queries = quantised(queries, qk, qk_scales, q_group, ties_away).mul_(last)
        keys = quantised(keys, qk, qk_scales, k_group, ties_away)
        values, v_scales = _values(v, v_format, v_scales_of)
        return sage.attend(queries, keys, values, v_scales, largest, q.dtype, probabilities)

    return attend


def quantised(x: Tensor, name: Format, scales: Scales, group: int = 0, ties_away: bool = False) -> Tensor:
    """Return the float32 numbers that x [B, H, T, D] becomes in a format. `group`: tokens that share a scale."""
    if name == "mxfp4":
        return sage.round_to_mxfp4(x, ties_away=ties_away)
    if name == "nvfp4":
        return sage.round_to_nvfp4(x)
    if name == "int8":
        return sage.round_to_int8(x, group)
    if name == "fp8":
        values, one = sage.quantise_e4m3(x, SAMPLE if scales == "tensor" else (-2,))
        return values.mul_(one)
    return x.to(torch.bfloat16 if x.dtype == torch.float32 else x.dtype).float()


def _values(v: Tensor, name: Format, scales: Scales) -> tuple[Tensor, Tensor]:
    """Return V as it is multiplied, and the scales of its products: [B, H, 1, D] or [B, H, 1, 1]."""
    if name == "fp8":
        values, one = sage.quantise_e4m3(v, SAMPLE if scales == "tensor" else (-2,))
        return values, one.expand(-1, v.shape[1], -1, -1)
    values = v.half().float() if name == "fp16" else quantised(v, name, scales)
    return values, values.new_ones(v.shape[0], v.shape[1], 1, 1)


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError for shapes that the kernels do not take."""
    if q.dim() != 4 or q.shape[-1] % sage.MX_BLOCK:
        raise ValueError(f"q {tuple(q.shape)}: must be [batch, heads, tokens, head_dim], head_dim a multiple of {sage.MX_BLOCK}")
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit q {tuple(q.shape)}")
