"""What the benchmark's rules fix: the size, length, steps, guidance, seed and negative prompt of every video.

Source: MLCommons Inference v6.1, text-to-video (wan-2.2-t2v-a14b). No recipe may change these values; a recipe for another
model names a whole workload of its own, and its results then say that they are not the benchmark's.
"""

from __future__ import annotations

from pydantic import ConfigDict, field_validator
from pydantic.dataclasses import dataclass

NEGATIVE_PROMPT = (
    "vivid colors, overexposed, static, blurry details, subtitles, style, work of art, painting, picture, still, overall "
    "grayish, worst quality, low quality, JPEG artifacts, ugly, deformed, extra fingers, poorly drawn hands, poorly drawn "
    "face, deformed, disfigured, deformed limbs, fused fingers, static image, cluttered background, three legs, many people "
    "in the background, walking backwards"
)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Workload:
    """One video: `height` x `width` pixels, `frames` at `fps` per second, from `steps` denoising steps.

    The high-noise expert runs while timestep >= boundary_ratio x 1000, with `guidance_high`; then the low-noise expert, with
    `guidance_low`. Raises ValueError for a size that is no multiple of 16 or a number of frames that is not 4 n + 1.
    """

    height: int
    width: int
    frames: int
    fps: int
    steps: int
    seed: int = 42
    guidance_high: float = 4.0
    guidance_low: float = 3.0
    boundary_ratio: float = 0.875
    negative_prompt: str = NEGATIVE_PROMPT

    @field_validator("height", "width")
    @classmethod
    def _size(cls, value: int) -> int:
        if not 16 <= value <= 4096 or value % 16:
            raise ValueError("allowed: a multiple of 16 from 16 to 4096")
        return value

    @field_validator("frames")
    @classmethod
    def _frames(cls, value: int) -> int:
        if not 1 <= value <= 1025 or value % 4 != 1:
            raise ValueError("allowed: 4 n + 1 from 1 to 1025, such as 17 or 81")
        return value

    @field_validator("steps")
    @classmethod
    def _steps(cls, value: int) -> int:
        if not 1 <= value <= 1000:
            raise ValueError("allowed: 1 to 1000")
        return value

    @field_validator("fps")
    @classmethod
    def _fps(cls, value: int) -> int:
        if not 1 <= value <= 120:
            raise ValueError("allowed: 1 to 120")
        return value

    @field_validator("seed")
    @classmethod
    def _seed(cls, value: int) -> int:
        if not 0 <= value < 2**63:
            raise ValueError("allowed: 0 to 2^63 - 1")
        return value

    @field_validator("guidance_high", "guidance_low")
    @classmethod
    def _guidance(cls, value: float) -> float:
        if not 1.0 < value <= 100.0:
            raise ValueError("allowed: above 1 (guidance on) to 100")
        return value

    @field_validator("boundary_ratio")
    @classmethod
    def _boundary(cls, value: float) -> float:
        if not 0.0 <= value <= 1.0:
            raise ValueError("allowed: 0 to 1")
        return value

    def latent_shape(self, channels: int, temporal: int = 4, spatial: int = 8) -> tuple[int, int, int, int]:
        """Return [channels, latent frames, latent height, latent width] for a VAE with these compression ratios."""
        return channels, (self.frames - 1) // temporal + 1, self.height // spatial, self.width // spatial


# The six of VBench that MLCommons scores.
DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "appearance_style",
    "scene",
)

MLPERF = Workload(height=720, width=1280, frames=81, fps=16, steps=20)
