"""What does a schedule cost? One prompt, one noise, two recipes: `python examples/compare_schedules.py`.

`python -m wan_mlperf.bench fidelity --case ...` does this over many prompts and also compares latents, motion and shape.
"""

from __future__ import annotations

import numpy as np

from wan_mlperf import Pipeline, load_recipe

PROMPT = "a red circle moving left on a blue background"
PLAIN = ("gemm.high_noise=bf16", "gemm.low_noise=bf16")  # so that attention is all that differs
# Sage attention in FP4 for the first half of the steps, then FP8; and in FP4 to the end.
SCHEDULES = (("attention.early_fraction=0.5",), ("attention.early_fraction=1.0",))


def frames_of(*overrides: str, exact: bool = False) -> np.ndarray:
    """Return the video, uint8 [frames, height, width, 3], and print how many steps use which attention kernel."""
    pipeline = Pipeline.load(load_recipe("tiny", overrides=[*PLAIN, *overrides], exact=exact))
    kernels = [step.attention for step in pipeline.plan]
    print({name: kernels.count(name) for name in sorted(set(kernels))})
    frames = pipeline.generate(PROMPT)
    assert frames is not None  # only ranks after the first get None
    return frames


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two different uint8 videos: higher is closer."""
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return float(10 * np.log10(255**2 / error))


def main(*more: str) -> list[float]:
    """Print how far each schedule is from no approximation at all; `more` are further overrides for every run."""
    exact = frames_of(*more, exact=True)
    distances = []
    for schedule in SCHEDULES:
        distances.append(psnr(exact, frames_of(*schedule, *more)))
        print(f"{', '.join(schedule)}: {distances[-1]:.1f} dB from exact")
    return distances


if __name__ == "__main__":
    main()
