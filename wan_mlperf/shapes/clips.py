"""The world of the embedded model: moving coloured shapes, and the captions that describe them.

A scene is a shape, its colour, the background's colour and a motion: 3 x 6 x 7 x 7 = 882 scenes. The embedded model is trained on
drawings of 756 of them. The other 126 are held out from everything that learns text or motion, and the model is scored on those
(`detect.py` measures what a video shows).

Shapes: F frames, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Final

import numpy as np
from numpy.typing import NDArray

SIZE: Final = 64
FRAMES: Final = 17

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (220, 40, 40),
    "green": (40, 165, 65),
    "blue": (40, 85, 225),
    "yellow": (245, 215, 50),
    "purple": (155, 50, 190),
    "cyan": (60, 205, 220),
    "black": (20, 20, 20),
    "white": (240, 240, 240),
}
SHAPES: Final = ("circle", "square", "triangle")
FOREGROUNDS: Final = ("red", "green", "blue", "yellow", "purple", "cyan")
BACKGROUNDS: Final = tuple(COLOURS)
MOTIONS: Final = ("left", "right", "up", "down", "growing", "shrinking", "still")
DIRECTIONS: Final = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

_MOTION_PHRASES: Final[dict[str, tuple[str, ...]]] = {
    "left": ("moving left", "moving to the left", "sliding left", "that moves left"),
    "right": ("moving right", "moving to the right", "sliding right", "that moves right"),
    "up": ("moving up", "moving upwards", "rising", "that moves up"),
    "down": ("moving down", "moving downwards", "sinking", "that moves down"),
    "growing": ("growing", "growing larger", "getting bigger", "that grows"),
    "shrinking": ("shrinking", "shrinking in size", "getting smaller", "that shrinks"),
    "still": ("standing still", "keeping still", "not moving", "that stays in place"),
}
_TEMPLATES: Final = (
    "a {foreground} {shape} {motion} on a {background} background",
    "a {foreground} {shape} {motion} over a {background} background",
    "on a {background} background, a {foreground} {shape} {motion}",
    "{foreground} {shape} {motion}, {background} background",
    "a video of a {shape} {motion}, the {shape} is {foreground} and the background is {background}",
)
PHRASINGS: Final = len(_TEMPLATES) * 4


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a clip shows. Each part is one of this file's words."""

    shape: str
    foreground: str
    background: str
    motion: str

    def __post_init__(self) -> None:
        """Reject a word that is not in the grammar, and a shape in the background's colour."""
        allowed = {"shape": SHAPES, "foreground": FOREGROUNDS, "background": BACKGROUNDS, "motion": MOTIONS}
        for name, words in allowed.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(words)}")
        if self.foreground == self.background:
            raise ValueError(f"a {self.foreground} shape cannot be seen on a {self.background} background")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a clip's shape is, in pixels: its centre at half time, its radius, how far it moves and how much it grows."""

    x: float
    y: float
    radius: float
    travel: float
    growth: float


@cache
def scenes() -> tuple[Scene, ...]:
    """Return every scene of the grammar, in a fixed order."""
    words = product(SHAPES, FOREGROUNDS, BACKGROUNDS, MOTIONS)
    return tuple(Scene(shape=s, foreground=f, background=b, motion=m) for s, f, b, m in words if f != b)


def is_held_out(scene: Scene) -> bool:
    """True if training must not see this scene: for each shape and pair of colours, one motion in seven is left out."""
    place = 3 * SHAPES.index(scene.shape) + FOREGROUNDS.index(scene.foreground)
    place += 2 * BACKGROUNDS.index(scene.background) + MOTIONS.index(scene.motion)
    return place % len(MOTIONS) == 0


@cache
def training_scenes() -> tuple[Scene, ...]:
    """Return the 756 scenes that training may see."""
    return tuple(scene for scene in scenes() if not is_held_out(scene))


def held_out_prompts() -> tuple[tuple[str, Scene], ...]:
    """Return the 126 held-out scenes, each with a caption, in an order that mixes all attributes: any first n are fair."""
    held_out = [scene for scene in scenes() if is_held_out(scene)]
    order = np.random.default_rng(0).permutation(len(held_out))
    return tuple((caption(held_out[j], int(i) % PHRASINGS), held_out[j]) for i, j in enumerate(order))


def caption(scene: Scene, phrasing: int = 0) -> str:
    """Describe a scene. `phrasing`, below `PHRASINGS`, chooses the wording; 0 is the plainest."""
    if not 0 <= phrasing < PHRASINGS:
        raise ValueError(f"phrasing={phrasing} is not in 0..{PHRASINGS - 1}")
    motion, template = divmod(phrasing, len(_TEMPLATES))
    return _TEMPLATES[template].format(
        shape=scene.shape,
        foreground=scene.foreground,
        background=scene.background,
        motion=_MOTION_PHRASES[scene.motion][motion],
    )


def place(scene: Scene, rng: np.random.Generator) -> Placement:
    """Choose a placement that keeps the shape inside the picture for the whole clip."""
    moves, resizes = scene.motion in DIRECTIONS, scene.motion in ("growing", "shrinking")
    along, across = (1.5, 4.0) if moves else (3.0, 3.0)
    horizontal = scene.motion in ("left", "right")
    x, y = rng.uniform(-1, 1, 2) * ((along, across) if horizontal else (across, along))
    growth = rng.uniform(10, 12) * (1 if scene.motion == "growing" else -1) if resizes else 0.0
    return Placement(
        x=SIZE / 2 + x,
        y=SIZE / 2 + y,
        radius=rng.uniform(12, 13) if resizes else rng.uniform(11, 14) if moves else rng.uniform(11, 16),
        travel=rng.uniform(17, 20) if moves else 0.0,
        growth=growth,
    )


def coverage(shape: str, x: float, y: float, radius: float) -> NDArray[np.float32]:
    """Return how much of each pixel a shape covers, [H, W] in 0..1, from its signed distance. (x, y) is its centroid."""
    v, u = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5
    u, v = u - x, v - y
    if shape == "circle":
        distance = np.hypot(u, v) - radius
    elif shape == "square":
        distance = np.maximum(abs(u), abs(v)) - 0.9 * radius
    elif shape == "triangle":  # equilateral, apex up; 0.65 radius is its inscribed circle
        distance = np.maximum(v, 0.5 * (np.sqrt(3.0) * abs(u) - v)) - 0.65 * radius
    else:
        raise ValueError(f"shape={shape!r} is not one of {', '.join(SHAPES)}")
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)


def draw(scene: Scene, placement: Placement) -> NDArray[np.uint8]:
    """Draw a clip, uint8 [F, H, W, 3]."""
    ahead = DIRECTIONS.get(scene.motion, (0, 0))
    masks = []
    for time in np.linspace(-0.5, 0.5, FRAMES):
        x = placement.x + ahead[0] * placement.travel * time
        y = placement.y + ahead[1] * placement.travel * time
        masks.append(coverage(scene.shape, x, y, placement.radius + placement.growth * time))
    mask = np.stack(masks)[..., None]
    foreground, background = (np.array(COLOURS[c], np.float32) for c in (scene.foreground, scene.background))
    return np.rint(mask * foreground + (1 - mask) * background).astype(np.uint8)
