"""What the benchmark's rules fix: the size, length, steps, guidance, seed and negative prompt of every video.

Source: MLCommons Inference v6.1, text-to-video (wan-2.2-t2v-a14b). No recipe may change these values. A recipe for another model
has its own complete workload, and its results say that they are not the benchmark's.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

NEGATIVE_PROMPT = (
    "vivid colors, overexposed, static, blurry details, subtitles, style, work of art, painting, picture, still, overall "
    "grayish, worst quality, low quality, JPEG artifacts, ugly, deformed, extra fingers, poorly drawn hands, poorly drawn "
    "face, deformed, disfigured, deformed limbs, fused fingers, static image, cluttered background, three legs, many people "
    "in the background, walking backwards"
)

Side = Annotated[int, Field(ge=16, le=4096, multiple_of=16)]  # pixels
GuidanceScale = Annotated[float, Field(gt=1.0, le=100.0)]  # at 1 there would be no guidance


def _not_random(value: object) -> object:
    if value == -1:
        raise ValueError("elsewhere it stands for a random seed, here each seed is named; allowed: 0 to 2^64 - 1")
    return value


Seed = Annotated[int, Field(ge=0, lt=2**64), BeforeValidator(_not_random)]  # what torch's generator takes, and other tools use


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Workload:
    """One video: `height` x `width` pixels, `frames` at `fps` per second, from `steps` denoising steps.

    The high-noise expert runs while timestep >= boundary_ratio x 1000, with `guidance_high`; then the low-noise expert, with
    `guidance_low`. Raises ValueError for a value out of its range, and for a number of frames that is not 4 n + 1.
    """

    height: Side
    width: Side
    frames: Annotated[int, Field(ge=1, le=1025)]
    fps: Annotated[int, Field(ge=1, le=120)]
    steps: Annotated[int, Field(ge=1, le=1000)]
    seed: Seed = 42
    guidance_high: GuidanceScale = 4.0
    guidance_low: GuidanceScale = 3.0
    boundary_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.875
    negative_prompt: str = NEGATIVE_PROMPT

    @field_validator("frames")
    @classmethod
    def _frames(cls, value: int) -> int:
        if value % 4 != 1:
            raise ValueError("allowed: 4 n + 1, such as 17 or 81")
        return value

    @property
    def values(self) -> int:
        """Number of pixels of a video, over all frames."""
        return self.height * self.width * self.frames

    def latent_shape(self, channels: int, temporal: int = 4, spatial: int = 8) -> tuple[int, int, int, int]:
        """Return [channels, latent frames, latent height, latent width] for a VAE with these compression ratios."""
        return channels, (self.frames - 1) // temporal + 1, self.height // spatial, self.width // spatial


# The six dimensions of VBench that MLCommons scores.
DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "appearance_style",
    "scene",
)

MLPERF = Workload(height=720, width=1280, frames=81, fps=16, steps=20)
