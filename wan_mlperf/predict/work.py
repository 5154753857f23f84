"""What one video takes, from first principles: FLOPs of the experts and of the decode, by what computes them.

T video tokens, S text tokens, C = heads x head dim, F FFN width, L layers. A product of [m, k] and [k, n] is 2 m k n FLOPs.
A rehearsal (rehearsal.py) counts the same from the running code; tests check that the two agree within 1 %.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from wan_mlperf.kernels.gemm import format_of
from wan_mlperf.step_plan import Layers
from wan_mlperf.workload import Workload

FILE = Path(__file__).with_name("wan22.json")


@dataclass(frozen=True, kw_only=True)
class ExpertSize:
    """The sizes of an expert; the defaults are Wan2.2-T2V-A14B's. `patch`: latent frames, rows and columns of a token."""

    layers: int = 40
    heads: int = 40
    head_dim: int = 128
    ffn: int = 13824
    text_tokens: int = 512
    latent_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)

    @property
    def width(self) -> int:
        """C: features of a token."""
        return self.heads * self.head_dim


WAN22 = ExpertSize()
DECODE_FLOPS = 0.6392e15  # of one video of the benchmark: `decode_flops(MLPERF)`


def published_config(part: str) -> dict[str, Any]:
    """Return the published configuration of a part of Wan2.2-T2V-A14B: transformer (both experts), vae or text_encoder."""
    config: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))[part]
    return config


def size_of_expert(config: dict[str, Any]) -> ExpertSize:
    """Return the sizes of an expert with this diffusers configuration."""
    return ExpertSize(
        layers=config["num_layers"],
        heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        ffn=config["ffn_dim"],
        latent_channels=config["in_channels"],
        patch=tuple(config["patch_size"]),
    )


def tokens_of(workload: Workload, size: ExpertSize = WAN22) -> int:
    """T: how many tokens a video has."""
    tokens = 1
    for length, side in zip(workload.latent_shape(0)[1:], size.patch, strict=True):
        tokens *= length // side
    return tokens


@cache
def text_encoder_numbers() -> float:
    """Number of weights in the published text encoder's layers; each is multiplied once per token."""
    config = published_config("text_encoder")
    inner, layers = config["num_heads"] * config["d_kv"], config["num_layers"]
    return float(layers * config["d_model"] * (4 * inner + 3 * config["d_ff"]))


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one forward of one branch, of all ranks together."""

    attention: float
    gemm: float
    cross_attention: float


def forward_flops(tokens: int, size: ExpertSize = WAN22) -> Flops:
    """FLOPs of one forward, without the text's keys and values, which do not change over the steps."""
    width = size.width
    return Flops(
        attention=size.layers * 4.0 * tokens**2 * width,
        # Q, K, V and output of self-attention, query and output of cross-attention: 6 products of C x C; the FFN's two of C x F.
        gemm=size.layers * (12.0 * tokens * width**2 + 4.0 * tokens * width * size.ffn),
        cross_attention=size.layers * 4.0 * tokens * size.text_tokens * width,
    )


@cache
def gemm_shares(name: str, layers: Layers = (), size: ExpertSize = WAN22) -> dict[str, float]:
    """Format -> its share of the linear layers' FLOPs in a forward of an expert in format `name`, with a step's `layers`."""
    square = dict.fromkeys((*(f"attn1.to_{one}" for one in ("q", "k", "v", "out.0")), "attn2.to_q", "attn2.to_out.0"), size.width)
    outputs = {**square, "ffn.net.0.proj": size.ffn, "ffn.net.2": size.ffn}  # times the width
    shares: Counter[str] = Counter()
    for block in range(size.layers):
        for part, numbers in outputs.items():
            shares[format_of(f"blocks.{block}.{part}", name, layers)] += numbers
    return {one: numbers / shares.total() for one, numbers in shares.items()}


def text_keys_flops(size: ExpertSize = WAN22) -> float:
    """FLOPs of the text's keys and values: once per expert and branch."""
    return 4.0 * size.layers * size.text_tokens * size.width**2


@cache
def decode_flops(workload: Workload) -> float:
    """FLOPs of the decode by the published VAE, counted on meta tensors."""
    from diffusers import AutoencoderKLWan
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(published_config("vae"))
        latents = torch.empty(1, *workload.latent_shape(vae.config.z_dim))
    vae.clear_cache()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.decoder(latents[:, :, :1], feat_cache=vae._feat_map, feat_idx=[0], first_chunk=True)
        if latents.shape[2] > 1:
            vae.decoder(latents[:, :, 1:], feat_cache=vae._feat_map, feat_idx=[0])
    return float(counter.get_total_flops())


def exchange_bytes(
    tokens: int, ulysses: int, size: ExpertSize = WAN22, *, qkv_bytes: float = 2.0, output_bytes: float = 2.0, ranks: int = 0
) -> float:
    """Bytes that one rank sends to the others of its Ulysses group in one forward: Q, K, V and the output of each layer.

    `ranks` is how many share the tokens (with a ring more than `ulysses`). Of a rank's T / ranks x C numbers, (U - 1) / U leave;
    Q, K and V in one byte bring a row of scales each (kernels/e4m3.py).
    """
    share = -(-tokens // (ranks or ulysses))
    rows = 3 * (share + (qkv_bytes == 1)) * qkv_bytes + share * output_bytes
    return size.layers * rows * size.width * (ulysses - 1) / ulysses
