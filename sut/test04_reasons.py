"""Why a TEST04 run was faster than the rule allows: a cache, or a reference run that was slow or noisy.

The times per sample of both runs show it. A repeated sample that is computed again each time takes as long as any other, so the
medians of the two runs agree; if the scores still differ, slow samples lowered the reference's score. If the medians differ,
either the reference was slow throughout, or the repeated sample is not computed again: then only the test's first sample is slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LIKE_THE_FIRST = 0.75  # a sample below this share of the test's first was not made as the first was


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A run's times per sample, in seconds."""

    samples: int
    fastest: float
    median: float
    p90: float
    slowest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """The spread of at least one time."""
        values = np.asarray(seconds, float)
        fastest, median, p90, slowest = (float(one) for one in np.percentile(values, (0, 50, 90, 100)))
        return cls(samples=len(values), fastest=fastest, median=median, p90=p90, slowest=slowest)

    def __str__(self) -> str:
        times = f"{self.fastest:.4g} / {self.median:.4g} / {self.p90:.4g} / {self.slowest:.4g} s"
        return f"{self.samples} samples: fastest / median / 90th percentile / slowest {times}"


def reasons(reference: Sequence[float], test: Sequence[float], *, limit: float) -> list[str]:
    """Say in a few sentences what the times of a failed test look like. `limit` is how much faster it may be."""
    if not reference or not test:
        return ["the times per sample of one of the runs are not known"]
    normal, same = Spread.of(reference), Spread.of(test)
    gap = normal.median / same.median - 1
    said = []
    if gap < limit:
        over = normal.p90 / normal.median - 1
        said.append(
            f"a noisy reference run: the medians differ by {gap:.1%} only, but its 90th percentile is {over:.0%} and its "
            f"slowest sample {normal.slowest / normal.median - 1:.0%} above its own median"
        )
    elif len(test) > 2 and np.median(test[1:]) < LIKE_THE_FIRST * test[0] and test[0] > (1 - limit) * normal.median:
        said.append(
            f"a cache: the test's first sample took {test[0]:.4g} s, like those of the reference, the others "
            f"{float(np.median(test[1:])):.4g} s"
        )
    else:
        said.append(f"a slow reference run: its median is {gap:.0%} above the test's")
        reached = float(np.mean(np.asarray(reference) <= same.p90))
        said.append(
            f"{reached:.0%} of its samples were as fast as the test's, so it was slow only for a while"
            if reached >= 0.05
            else "none of its samples was as fast as the test's: was the machine busy, or its clocks lower, the whole time?"
        )
    drift = _drift(reference)
    if abs(drift) > limit / 2:
        said.append(f"the reference's second half is {abs(drift):.0%} {'slower' if drift > 0 else 'faster'} than its first")
    return said


def _drift(seconds: Sequence[float]) -> float:
    half = len(seconds) // 2
    return float(np.median(seconds[half:]) / np.median(seconds[:half]) - 1) if half else 0.0
