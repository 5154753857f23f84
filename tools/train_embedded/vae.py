"""The second stage: an `AutoencoderKLWan` that learns to compress the drawn clips.

Shapes: B batch, C channels, F frames, H height, W width; latents are [B, 16, (F + 3) / 4, H / 8, W / 8].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanCausalConv3d, WanResidualBlock
from torch import Tensor, nn

from wan_mlperf.shapes.clips import Scene

from .data import clips
from .loop import cosine, fit, mixed, noise, rng, set_rate
from .muon import Muon

REFINE_STEPS: Final = 1400


def build(base: int = 16, decoder_base: int = 24) -> AutoencoderKLWan:
    """Make a narrow version of Wan2.2's autoencoder. With diffusers' own initial values training stalls at 12 dB.

    At first, convolutions keep the scale of their input and ignore earlier frames, convolutions over time pass their input on,
    the middle attention adds nothing, and residual branches are small.
    """
    vae = AutoencoderKLWan(
        base_dim=base,
        decoder_base_dim=decoder_base,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                weight, bias = module.weight, module.bias
                assert bias is not None
                seen = weight[:, :, -1:] if isinstance(module, WanCausalConv3d) else weight
                nn.init.zeros_(weight)
                nn.init.normal_(seen, std=seen[0].numel() ** -0.5)
                nn.init.zeros_(bias)
                if weight.shape[2:] == (3, 1, 1):  # a time convolution
                    weight[:, :, -1, 0, 0] = torch.eye(weight.shape[1]).repeat(weight.shape[0] // weight.shape[1], 1)
        for module in vae.modules():
            if isinstance(module, WanResidualBlock):
                module.conv2.weight.mul_(0.3)
            elif isinstance(module, WanAttentionBlock):
                nn.init.zeros_(module.proj.weight)
        vae.quant_conv.bias[vae.config.z_dim :] = -4.0  # log variance: the noise must not hide the picture at first
    return vae


def fast_layout(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Store the convolutions' weights channels last, in place, which saves a quarter of the time on a CPU."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return vae


def _run(half: nn.Module, x: Tensor) -> Tensor:
    """Run the encoder or decoder over a whole clip in two calls, for the first frame and the rest. diffusers calls it per latent
    frame.

    The first frame is computed in float32: on CPUs with AMX, the gradient of a bf16 convolution over few frames of 64 x 64 is NaN
    (torch 2.13).
    """
    convolutions = sum(isinstance(m, WanCausalConv3d) for m in half.modules())
    cache: list[Tensor | str | None] = [None] * convolutions
    if x.shape[2] == 1:
        return half(x, feat_cache=cache, feat_idx=[0])
    with torch.autocast(x.device.type, enabled=False):
        out = half(x[:, :, :1].float(), feat_cache=cache, feat_idx=[0])
    return torch.cat([out, half(x[:, :, 1:], feat_cache=cache, feat_idx=[0])], dim=2)


def encode(vae: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log variance of the latents of a video, [B, 3, F, H, W] in -1..1."""
    mean, log_variance = vae.quant_conv(_run(vae.encoder, video)).chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Return the video of latents, not clamped."""
    return _run(vae.decoder, vae.post_quant_conv(latents))


def _edges(video: Tensor) -> Tensor:
    """Return each pixel's weight, [B, 1, F, H, W]: 4 within a pixel of an outline, else 1. Outlines are rare and hard."""
    high = F.max_pool3d(video, (1, 3, 3), 1, (0, 1, 1)).sub(-F.max_pool3d(-video, (1, 3, 3), 1, (0, 1, 1)))
    return 1.0 + 3.0 * (high.amax(1, keepdim=True) > 0.1)


def _difference(video: Tensor, target: Tensor) -> Tensor:
    """Return L1 plus squared error, with weighted outlines."""
    error = (video.float() - target).abs()
    weight = _edges(target)
    return ((error + error.square()) * weight).mean() / weight.mean()


def _optimizers(vae: AutoencoderKLWan) -> dict[str, torch.optim.Optimizer]:
    """Use Muon for all convolutions but the first and last, and AdamW for the other weights that are not frozen.

    40 steps get as far as 150 of AdamW alone.
    """
    ends = {id(vae.encoder.conv_in.weight), id(vae.decoder.conv_out.weight)}
    free = [p for p in vae.parameters() if p.requires_grad]
    inner = [p for p in free if p.ndim >= 4 and p[0].numel() > 1 and id(p) not in ends]
    known = {id(p) for p in inner}
    rest = [p for p in free if id(p) not in known]
    return {
        "muon": Muon(inner, lr=3e-3),
        "adamw": torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0),
    }


def _psnr(video: Tensor, target: Tensor) -> float:
    """Return the peak signal-to-noise ratio of a batch in -1..1, in dB."""
    return -10 * math.log10((video.detach().float() - target).square().mean().item() / 4)


def _crop(video: Tensor, generator: np.random.Generator, frames: int, size: int) -> Tensor:
    """Cut the same random window, `frames` frames of `size` x `size` pixels, from all clips."""
    top, left = generator.integers(0, video.shape[-1] - size + 1, 2)
    begin = int(generator.integers(0, video.shape[2] - frames + 1))
    return video[:, :, begin : begin + frames, top : top + size, left : left + size]


def train(work: Path, seed: int, scale: float, device: torch.device) -> AutoencoderKLWan:
    """Train encoder and decoder: first frames, then short crops, then whole clips."""
    torch.manual_seed(seed)
    vae = fast_layout(build()).to(device)
    both = _optimizers(vae)
    # steps, then batch, frames and size of each of them
    phases = ((120, (16, 1, 32)), (120, (8, 9, 32)), (90, (2, 17, 64)))
    plan = [phase for steps, phase in phases for _ in range(max(1, round(steps * scale)))]

    def step(i: int) -> dict[str, float]:
        generator, (batch, frames, size) = rng(seed, "vae", i), plan[i]
        for optimizer in both.values():
            set_rate(optimizer, cosine(i, len(plan)))
            optimizer.zero_grad()
        video = _crop(clips(generator, batch)[0], generator, frames, size).to(device)
        video = video.contiguous(memory_format=torch.channels_last_3d)
        with mixed(device):
            mean, log_variance = encode(vae, video)
            mean, log_variance = mean.float(), log_variance.float()
            latents = mean + (0.5 * log_variance).exp() * noise(generator, tuple(mean.shape), device)
            decoded = decode(vae, latents)
        loss = _difference(decoded, video)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        (loss + 2e-4 * divergence).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0, error_if_nonfinite=True)
        for optimizer in both.values():
            optimizer.step()
        return {"loss": loss.item(), "divergence": divergence.item(), "psnr": _psnr(decoded, video)}

    fit(work, "vae", len(plan), {"vae": vae, **both}, step)
    return vae.eval()


Disturb = Callable[[np.random.Generator, Tensor, list[Scene]], Tensor]
"""Latents of clips, and what they show -> these latents as an expert would predict them."""


def refine(
    work: Path, seed: int, scale: float, device: torch.device, vae: AutoencoderKLWan, disturb: Disturb
) -> AutoencoderKLWan:
    """Continue to train the decoder with the encoder frozen, for sharp and steady outlines from imperfect latents like the
    experts'.

    The experts do not depend on the decoder, so this can run at the same time as their training.
    """
    vae.requires_grad_(False)
    parameters = [*vae.decoder.requires_grad_(True).parameters(), *vae.post_quant_conv.requires_grad_(True).parameters()]
    both = _optimizers(vae)
    steps = max(4, round(REFINE_STEPS * scale))

    def step(i: int) -> dict[str, float]:
        for optimizer in both.values():
            set_rate(optimizer, 0.2 * cosine(i, steps))  # at 0.35 the loss first rises by half and hardly comes back
            optimizer.zero_grad()
        loss, psnr = steadiness(vae, disturb, rng(seed, "refine", i), device)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        for optimizer in both.values():
            optimizer.step()
        return {"loss": loss.item(), "psnr": psnr}

    fit(work, "refine", steps, {"decoder": vae.decoder, "post": vae.post_quant_conv, **both}, step)
    return vae.eval()


def steadiness(
    vae: AutoencoderKLWan, disturb: Disturb, generator: np.random.Generator, device: torch.device
) -> tuple[Tensor, float]:
    """Return the loss of `refine` and the PSNR of two clips whose latents were disturbed."""
    drawn, shown = clips(generator, 2)
    video = drawn.to(device).contiguous(memory_format=torch.channels_last_3d)
    with mixed(device):
        with torch.no_grad():
            latents = disturb(generator, encode(vae, video)[0].float(), shown)
        decoded = decode(vae, latents).float()
    return _difference(decoded, video) + _difference(decoded.diff(dim=2), video.diff(dim=2)), _psnr(decoded, video)
