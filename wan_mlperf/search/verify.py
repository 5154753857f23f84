"""Runs the best schedules from end to end: is their error as predicted, and what do the videos look like?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.stats

from wan_mlperf.bench.fidelity import Generated, compare
from wan_mlperf.search.choices import Schedule, exact
from wan_mlperf.search.measure import Bench
from wan_mlperf.shapes.clips import Scene
from wan_mlperf.shapes.detect import score


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A schedule's predicted and measured relative error, PSNR in dB and SSIM against exact; `shown`: shares of right videos."""

    name: str
    schedule: Schedule
    cost: float
    predicted: float
    measured: float
    psnr: float
    ssim: float
    shown: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "shown": dict(self.shown)}


def run(
    bench: Bench, schedules: Mapping[str, tuple[Schedule, float, float]], scenes: Sequence[Scene], *, steps: int
) -> list[Outcome]:
    """On every rank: run each schedule (name -> schedule, cost, predicted error) on all prompts. Empty except on first ranks."""
    reference = bench.run(exact(steps), name="exact", frames=True)
    outcomes = []
    for name, (schedule, cost, predicted) in schedules.items():
        made = bench.run(schedule, name=name, frames=True)
        if made is None or reference is None:
            continue
        assert made.frames is not None and reference.frames is not None
        figures = [
            compare(Generated(high=ours, end=ours, frames=frames), Generated(high=theirs, end=theirs, frames=exact_frames))
            for ours, frames, theirs, exact_frames in zip(
                made.latents, made.frames, reference.latents, reference.frames, strict=True
            )
        ]
        shown = score(list(made.frames), scenes) if scenes else {}
        outcomes.append(
            Outcome(
                name=name,
                schedule=schedule,
                cost=cost,
                predicted=predicted,
                measured=float(np.mean([one["latents_end"] ** 2 for one in figures]) ** 0.5),
                psnr=float(np.mean([one["psnr"] for one in figures])),
                ssim=float(np.mean([one["ssim"] for one in figures])),
                shown={key: float(value) for key, value in shown.items()},
            )
        )
    return outcomes


def rank_correlation(outcomes: Sequence[Outcome]) -> float | None:
    """Return Spearman's correlation of predicted and measured errors, or None for fewer than three schedules."""
    if len(outcomes) < 3:
        return None
    return float(scipy.stats.spearmanr([one.predicted for one in outcomes], [one.measured for one in outcomes]).statistic)
