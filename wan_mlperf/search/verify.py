"""Runs the best schedules from end to end: is their error as predicted, and what do the videos look like?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import scipy.stats

from wan_mlperf.bench.fidelity import Generated, compare
from wan_mlperf.parallel.mesh import from_all
from wan_mlperf.search.choices import Schedule, exact
from wan_mlperf.search.measure import Bench, Made
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

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return {**asdict(self), "shown": dict(self.shown)}


def run(
    bench: Bench, schedules: Mapping[str, tuple[Schedule, float, float]], scenes: Sequence[Scene], *, steps: int
) -> list[Outcome]:
    """On every rank: run the schedules (name -> schedule, cost, predicted error) on all prompts. Each replica runs its share.

    All ranks get all outcomes. They load together, so that all replicas finish a pair of GEMM formats before the next one.
    """
    mesh = bench.pipeline(exact(steps).formats()).mesh
    reference = bench.run(exact(steps), name="exact", frames=True)
    outcomes = []
    own = [name for number, name in enumerate(schedules) if number % mesh.shape.replicas == mesh.replica]
    for formats in dict.fromkeys(schedule.formats() for schedule, _, _ in schedules.values()):
        bench.pipeline(formats)
        names = [name for name in own if schedules[name][0].formats() == formats]
        outcomes += [one for name in names if (one := _outcome(bench, name, schedules[name], scenes, reference)) is not None]
        bench.pipeline(formats).mesh.barrier()
    found = {one.name: one for rank in from_all(outcomes) for one in rank}
    return [found[name] for name in schedules]


def _outcome(
    bench: Bench, name: str, finalist: tuple[Schedule, float, float], scenes: Sequence[Scene], reference: Made | None
) -> Outcome | None:
    """Run one schedule, and compare it with the exact one on the replica's first rank."""
    schedule, cost, predicted = finalist
    made = bench.run(schedule, name=name, frames=True)
    if made is None or reference is None:
        return None
    assert made.frames is not None and reference.frames is not None
    figures = [
        compare(Generated(high=ours, end=ours, frames=frames), Generated(high=theirs, end=theirs, frames=exact_frames))
        for ours, frames, theirs, exact_frames in zip(made.latents, made.frames, reference.latents, reference.frames, strict=True)
    ]
    shown = score(list(made.frames), scenes) if scenes else {}
    return Outcome(
        name=name,
        schedule=schedule,
        cost=cost,
        predicted=predicted,
        measured=float(np.mean([one["latents_end"] ** 2 for one in figures]) ** 0.5),
        psnr=float(np.mean([one["psnr"] for one in figures])),
        ssim=float(np.mean([one["ssim"] for one in figures])),
        shown={key: float(value) for key, value in shown.items()},
    )


def rank_correlation(outcomes: Sequence[Outcome]) -> float | None:
    """Return Spearman's correlation of predicted and measured errors, or None for fewer than three schedules."""
    if len(outcomes) < 3:
        return None
    return float(scipy.stats.spearmanr([one.predicted for one in outcomes], [one.measured for one in outcomes]).statistic)
