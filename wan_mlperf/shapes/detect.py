"""Recognise what a video shows: the shape, its colour, the background's colour and the motion, from the pixels alone.

It knows the words of `clips.py` and how a shape looks, but never the prompt. First it measures the two colours. Then it places
each pixel between them, which gives the shape's coverage even where its outline is soft. The coverage's centre and area over time
give the motion, and the shape is the one whose drawing at the same centre and area is nearest.

Shapes: F frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import affine_transform

from wan_mlperf.shapes.clips import BACKGROUNDS, COLOURS, FOREGROUNDS, SHAPES, SIZE, Scene, coverage

MOVES = 6.0
"""Pixels over the whole clip from which a shape counts as moving; drawn ones travel 17 to 20."""
RESIZES = 4.0
"""Pixels of radius over the whole clip from which it counts as growing or shrinking; drawn ones change by 10 to 12."""
_UNIT_AREA = {"circle": np.pi, "square": 4 * 0.9**2, "triangle": 3 * np.sqrt(3) * 0.65**2}


def detect(frames: NDArray[np.uint8]) -> Scene:
    """Name what a clip shows, uint8 [F, 64, 64, 3]. Even a clip that shows nothing gets the nearest words."""
    foreground, background, alpha = _measure(frames)
    return Scene(shape=_shape(alpha), foreground=foreground, background=background, motion=_motion(*_track(alpha)))


def steadiness(frames: NDArray[np.uint8]) -> float:
    """Return how steady the outline of a clip's shape is while it moves or changes size; 1 means it does nothing else.

    Every frame's coverage is moved and scaled to the clip's mean centre and area. The result is the mean over frames of its
    overlap with their mean (intersection over union). Drawn clips, whose edges fall on other pixels in each frame, reach about
    0.98.
    """
    alpha = _measure(frames)[2]
    x, y, area = _track(alpha)
    radius = np.sqrt(np.maximum(area, 1.0))
    middle = (SIZE - 1) / 2
    still = np.stack(
        [
            affine_transform(mask, np.full(2, scale), np.array([cy, cx]) - 0.5 - middle * scale, order=1)
            for mask, cx, cy, scale in zip(alpha, x, y, radius / radius.mean(), strict=True)
        ]
    )
    mean = still.mean(0)
    return float(np.mean([np.minimum(frame, mean).sum() / max(np.maximum(frame, mean).sum(), 1e-6) for frame in still]))


def _measure(frames: NDArray[np.uint8]) -> tuple[str, str, NDArray[np.float32]]:
    """Return the names of foreground and background, and the shape's coverage [F, H, W]."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"frames must be uint8 [F, {SIZE}, {SIZE}, 3], not {frames.dtype} {list(frames.shape)}")
    video = frames.astype(np.float32)
    border = np.concatenate([video[:, :2].reshape(-1, 3), video[:, -2:].reshape(-1, 3)])
    background = np.median(border, axis=0)
    background_name = _nearest(background, BACKGROUNDS)

    distance = np.linalg.norm(video - background, axis=-1)
    inside = distance > 0.8 * np.quantile(distance, 0.97)
    foreground = np.median(video[inside], axis=0) if inside.any() else background
    foreground_name = _nearest(foreground, [name for name in FOREGROUNDS if name != background_name])

    span = foreground - background
    alpha = np.clip((video - background) @ span / max(float(span @ span), 1.0), 0.0, 1.0)
    alpha[alpha < 0.15] = 0.0  # ripples of the background would pull the centre towards the middle
    return foreground_name, background_name, alpha


def score(videos: Iterable[NDArray[np.uint8]], scenes: Sequence[Scene]) -> dict[str, float]:
    """Return the fraction of videos that show what their scene says, per attribute: foreground, background, direction, shape."""
    seen = [detect(video) for video in videos]
    if len(seen) != len(scenes) or not seen:
        raise ValueError(f"{len(seen)} videos for {len(scenes)} scenes")
    fields = {"foreground": "foreground", "background": "background", "direction": "motion", "shape": "shape"}
    return {
        name: sum(getattr(a, field) == getattr(b, field) for a, b in zip(seen, scenes, strict=True)) / len(seen)
        for name, field in fields.items()
    }


def _nearest(colour: NDArray[np.float32], names: Sequence[str]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(colour - np.array(COLOURS[name]))))


def _track(alpha: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return centre x, centre y and area of the coverage [F, H, W], each [F]. An empty frame's centre is the middle."""
    position = np.arange(SIZE) + 0.5
    area = alpha.sum((1, 2), dtype=np.float64)
    safe = np.maximum(area, 1e-6)
    x = np.where(area > 1, (alpha.sum(1) @ position) / safe, SIZE / 2)
    y = np.where(area > 1, (alpha.sum(2) @ position) / safe, SIZE / 2)
    return x, y, area


def _motion(x: NDArray[np.float64], y: NDArray[np.float64], area: NDArray[np.float64]) -> str:
    """Return the motion that straight lines through centre and radius over time show most clearly."""

    def change(values: NDArray[np.float64]) -> float:
        return float(np.polyfit(np.linspace(0, 1, len(values)), values, 1)[0]) if len(values) > 1 else 0.0

    right, down = change(x) / MOVES, change(y) / MOVES
    growth = change(np.sqrt(area / np.pi)) / RESIZES
    size, word = max(
        (abs(right), "right" if right > 0 else "left"),
        (abs(down), "down" if down > 0 else "up"),
        (abs(growth), "growing" if growth > 0 else "shrinking"),
    )
    return word if size >= 1 else "still"


def _shape(alpha: NDArray[np.float32]) -> str:
    """Return the shape whose coverage, drawn with the measured centres and areas, differs least from the measured one."""
    x, y, area = _track(alpha)

    def error(shape: str) -> float:
        return sum(
            float(np.square(mask - coverage(shape, cx, cy, np.sqrt(a / _UNIT_AREA[shape]))).sum())
            for mask, cx, cy, a in zip(alpha, x, y, area, strict=True)
        )

    return min(SHAPES, key=error)
