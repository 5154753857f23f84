"""The floor: seconds of a video's FLOPs at a GPU's dense peaks and of its exchange at the links' peak. No kernel reaches it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from wan_mlperf.parallel.mesh import Shape
from wan_mlperf.predict import rates, work
from wan_mlperf.predict.prices import Prices, Seconds
from wan_mlperf.step_plan import Step


def floor_of(prices: Prices, plan: Sequence[Step]) -> Seconds:
    """Lower bound of one video by part, s. FP4 attention has Q K^T at FP4's peak and P V at FP8's; the decode is at bf16's."""
    total = Seconds(vae_decode=work.decode_flops(prices.workload) / prices.gpu.peak("bf16") / prices.shape.per_replica)
    for step in plan:
        if step.source is None:
            total += _forward(prices, step) * (2 / prices.shape.cfg if step.guided else 1)
    return total


def exchange_of(prices: Prices, shape: Shape) -> tuple[float, float]:
    """(bytes that one rank sends in a step, seconds at the peak of the links that it uses) on the mesh `shape`."""
    tokens = work.tokens_of(prices.workload, prices.size)
    qkv, output = prices.ways.qkv_bytes, prices.ways.output_bytes
    ranks = shape.ulysses * shape.ring
    forward = work.exchange_bytes(tokens, shape.ulysses, prices.size, qkv_bytes=qkv, output_bytes=output, ranks=ranks)
    sent = forward * 2 / shape.cfg
    links = max(1, shape.ulysses - 1) if prices.gpu.fabric == "mesh" else 1
    return sent, sent / (links * prices.gpu.link_gb_s * 1e9)


def _forward(prices: Prices, step: Step) -> Seconds:
    shape = prices.shape if step.guided else prices.unguided_shape
    ranks = shape.ulysses * shape.ring
    size = replace(prices.size, text_tokens=prices.ways.text_tokens)
    flops = work.forward_flops(work.tokens_of(prices.workload, size), size)
    gpu = prices.gpu
    form = rates.attention(prices.kernel(step.attention), gpu, prices.values).form
    halves = ("fp4", "fp8") if form == "fp4" and gpu.fp4 is not None else (form, form)
    attention = sum(flops.attention / 2 / gpu.peak(one) for one in halves) + flops.cross_attention / gpu.peak("bf16")
    _, exchange = exchange_of(prices, replace(shape, cfg=2))  # of one forward
    shares = work.gemm_shares(step.gemm, step.layers, prices.size)
    gemm = sum(share * flops.gemm / gpu.peak(rates.GEMM_FORMATS[name]) for name, share in shares.items())
    return Seconds(attention=attention / ranks, gemm=gemm / ranks, exchange=exchange)
