"""The third stage: the latents of many clips, encoded once, and their mean and standard deviation per channel.

Shapes: N clips, C channels, F latent frames, h w latent height and width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from wan_mlperf.shapes.clips import draw, place, training_scenes

from .loop import fit, mixed, rng
from .vae import encode

BATCH = 6


class Latents(nn.Module):
    """Latents as the experts see them. Clip n shows `training_scenes()[n % len]`."""

    values: Tensor

    def __init__(self, count: int) -> None:
        """Make room for `count` clips of 64 x 64 pixels and 17 frames."""
        super().__init__()
        self.register_buffer("values", torch.zeros(count, 16, 5, 8, 8))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation per channel, each [C]."""
        return self.values.mean((0, 2, 3, 4)), self.values.std((0, 2, 3, 4))

    def normalized(self) -> Tensor:
        """Return all latents, with mean 0 and standard deviation 1 per channel."""
        mean, std = (x.view(1, -1, 1, 1, 1) for x in self.statistics())
        return (self.values - mean) / std


def make(work: Path, seed: int, scale: float, device: torch.device, vae: AutoencoderKLWan) -> Latents:
    """Encode about 4,500 clips, six of each scene, with the mean of the posterior."""
    known = training_scenes()
    steps = max(8, round(len(known) * scale))
    latents = Latents(BATCH * steps)

    def step(i: int) -> dict[str, float]:
        generator = rng(seed, "latents", i)
        chosen = [known[n % len(known)] for n in range(BATCH * i, BATCH * (i + 1))]
        drawn = np.stack([draw(scene, place(scene, generator)) for scene in chosen])
        video = torch.from_numpy(drawn).permute(0, 4, 1, 2, 3).float().to(device) / 127.5 - 1.0
        with torch.no_grad(), mixed(device):
            mean, _ = encode(vae, video.contiguous(memory_format=torch.channels_last_3d))
        latents.values[BATCH * i : BATCH * (i + 1)] = mean.float().cpu()
        return {"spread": mean.float().std().item()}

    fit(work, "latents", steps, {"latents": latents}, step)
    return latents
