"""Clips and captions to train on, drawn when they are needed. Nothing is stored; the same seed gives the same stream.

Shapes: B batch, F frames, H height, W width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from wan_mlperf.shapes.clips import PHRASINGS, Scene, caption, draw, place, training_scenes


def clips_scenes(generator: np.random.Generator, count: int) -> list[Scene]:
    """Draw scenes at random from those that training may see."""
    known = training_scenes()
    return [known[i] for i in generator.integers(len(known), size=count)]


def clips(generator: np.random.Generator, count: int) -> tuple[Tensor, list[Scene]]:
    """Draw random training clips, [B, 3, F, H, W] in -1..1, and say what they show."""
    chosen = clips_scenes(generator, count)
    drawn = np.stack([draw(scene, place(scene, generator)) for scene in chosen])
    return torch.from_numpy(drawn).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0, chosen


def captions(generator: np.random.Generator, scenes: list[Scene]) -> list[str]:
    """Write one caption for each scene, in a random phrasing."""
    phrasings = generator.integers(PHRASINGS, size=len(scenes))
    return [caption(scene, int(phrasing)) for scene, phrasing in zip(scenes, phrasings, strict=True)]
