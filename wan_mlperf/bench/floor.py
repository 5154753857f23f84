"""Scaling on paper: FLOPs and bytes of one video from first principles, what a mesh sends, and the lower bound they imply.

T video tokens, S text tokens, C = heads x head dim, F FFN width, L layers. A product of [m, k] and [k, n] is 2 m k n FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from wan_mlperf import cli, process
from wan_mlperf.bench.fidelity import console
from wan_mlperf.workload import MLPERF, Workload

EARLY_FRACTION = 0.85  # FP4 attention in the early steps, as in configs/mi355x-singlestream.yaml


@dataclass(frozen=True, kw_only=True)
class ExpertSize:
    """Sizes of the experts. The defaults are Wan2.2-T2V-A14B's."""

    width: int = 5120
    ffn: int = 13824
    layers: int = 40
    text_tokens: int = 512
    latent_channels: int = 16


@dataclass(frozen=True, kw_only=True)
class Peak:
    """A GPU's dense peaks in FLOP/s, its memory bandwidth in bytes/s, and what it can send to all others together, in bytes/s.

    The defaults are AMD's figures for the MI355X: 10.1 PFLOP/s in MXFP4, 5.0 in FP8, 2.5 in bf16, 8 TB/s, seven links of
    76.8 GB/s each way.
    """

    fp4: float = 10.1e15
    fp8: float = 5.0e15
    bf16: float = 2.5e15
    memory: float = 8.0e12
    links: float = 7 * 76.8e9


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one video with both branches of guidance, per part."""

    attention: float
    gemm: float
    cross_attention: float
    vae: float


def tokens_of(workload: Workload) -> int:
    """Return T, the number of video tokens: a token is 1 x 2 x 2 latent values."""
    _, frames, height, width = workload.latent_shape(0)
    return frames * (height // 2) * (width // 2)


def flops_of(workload: Workload = MLPERF, model: ExpertSize | None = None) -> Flops:
    """Return the FLOPs of one video. Text keys and values count once per expert and branch: they are the same in every step."""
    model = model or ExpertSize()
    tokens, width, text = tokens_of(workload), model.width, model.text_tokens
    forwards = 2 * workload.steps
    # Q, K, V and output of self-attention, query and output of cross-attention: 6 products of C x C; the FFN's two of C x F.
    gemm = model.layers * (12 * tokens * width**2 + 4 * tokens * width * model.ffn)
    text_gemm = 4 * model.layers * 4 * text * width**2
    return Flops(
        attention=forwards * model.layers * 4.0 * tokens**2 * width,
        gemm=float(forwards * gemm + text_gemm),
        cross_attention=forwards * model.layers * 4.0 * tokens * text * width,
        vae=vae_flops(workload),
    )


def vae_flops(workload: Workload) -> float:
    """Count the decode's FLOPs on meta tensors, for the published VAE (base 96, multipliers 1-2-4-4, two residual blocks)."""
    with torch.device("meta"):
        vae = AutoencoderKLWan()
        latents = torch.empty(1, *workload.latent_shape(vae.config.z_dim))
    vae.clear_cache()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.decoder(latents[:, :, :1], feat_cache=vae._feat_map, feat_idx=[0], first_chunk=True)
        if latents.shape[2] > 1:
            vae.decoder(latents[:, :, 1:], feat_cache=vae._feat_map, feat_idx=[0])
    return float(counter.get_total_flops())


def communication_of(workload: Workload, *, cfg: int, ulysses: int, model: ExpertSize | None = None) -> float:
    """Return the bytes that one rank sends per denoising step in bf16.

    Ulysses: Q, K, V and the output of each layer, T / U x C numbers, of which (U - 1) / U leave the rank, per branch that it
    computes; then its share of the gathered output. CFG: the noise prediction once.
    """
    model = model or ExpertSize()
    branches = 2 // cfg
    share = tokens_of(workload) / ulysses
    exchange = 4 * share * model.width * 2 * (ulysses - 1) / ulysses * model.layers
    noise = torch.Size(workload.latent_shape(model.latent_channels)).numel() * 2
    gather = noise / ulysses * (ulysses - 1)
    return branches * (exchange + gather) + (noise if cfg == 2 else 0)


def floor_seconds(workload: Workload = MLPERF, *, gpus: int = 8, peak: Peak | None = None) -> dict[str, float]:
    """Return seconds per part of one video on `gpus` at their dense peaks: FP4 Q K^T and FP8 P V early, FP8 late, MXFP4 GEMMs."""
    peak, flops = peak or Peak(), flops_of(workload)
    early, late = EARLY_FRACTION * flops.attention, (1 - EARLY_FRACTION) * flops.attention
    return {
        "attention": (early / 2 / peak.fp4 + early / 2 / peak.fp8 + late / peak.fp8) / gpus,
        "cross_attention": flops.cross_attention / peak.bf16 / gpus,
        "gemm": flops.gemm / peak.fp4 / gpus,
        # The reference decodes in fp32. The rate of bf16 is a lower bound for any dtype with its range.
        "vae": flops.vae / peak.bf16 / gpus,
    }


def expert_weight_bytes(model: ExpertSize | None = None) -> dict[str, float]:
    """Return the bytes of one expert's linear layers, which are read once per forward pass."""
    model = model or ExpertSize()
    numbers = model.layers * (8 * model.width**2 + 2 * model.width * model.ffn)
    return {"bf16": 2.0 * numbers, "mxfp4": numbers * (0.5 + 1 / 32)}


def main(arguments: Sequence[str]) -> int:
    """`bench floor`: print the tables."""
    cli.Parser(prog="python -m wan_mlperf.bench floor", description=__doc__).parse_args(arguments)
    flops, seconds, peak = flops_of(), floor_seconds(), Peak()
    parts = Table(
        title=f"One video, {tokens_of(MLPERF):,} tokens, {MLPERF.steps} steps, both branches; 8 x MI355X at dense peaks"
    )
    for heading in ("part", "PFLOP", "lower bound, s"):
        parts.add_column(heading, justify="left" if heading == "part" else "right")
    for part, value in seconds.items():
        parts.add_row(part.replace("_", " "), f"{getattr(flops, part) / 1e15:.2f}", f"{value:.3f}")
    parts.add_row("all", f"{sum(vars(flops).values()) / 1e15:.2f}", f"{sum(seconds.values()):.3f}")
    console().print(parts)
    meshes = Table(title="What one rank sends per step, bf16, and its time at the peak of seven links; 20 steps")
    for heading in ("mesh", "MB per step", "ms per step", "s per video"):
        meshes.add_column(heading, justify="left" if heading == "mesh" else "right")
    for cfg, ulysses in ((1, 8), (2, 4), (2, 2), (2, 1)):
        sent = communication_of(MLPERF, cfg=cfg, ulysses=ulysses)
        time = sent / peak.links
        meshes.add_row(f"CFG {cfg} x Ulysses {ulysses}", f"{sent / 1e6:.0f}", f"{time * 1e3:.2f}", f"{time * MLPERF.steps:.3f}")
    console().print(meshes)
    sizes = ", ".join(
        f"{name} {size / 1e9:.1f} GB ({size / peak.memory * 1e3:.2f} ms)" for name, size in expert_weight_bytes().items()
    )
    print(f"One expert's weights, read once per forward pass: {sizes}")
    return process.DONE
