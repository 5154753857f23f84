"""What the times of a failed TEST04 say, on times made up for each case."""

from __future__ import annotations

import numpy as np
import pytest

from sut.test04_reasons import Spread, reasons

STEADY = [16.0 + 0.05 * (number % 3) for number in range(100)]


def noisy(share: float, factor: float) -> list[float]:
    """STEADY with that share of the samples slower."""
    every = round(1 / share)
    return [seconds * (factor if number % every == 0 else 1) for number, seconds in enumerate(STEADY)]


@pytest.mark.parametrize(
    ("reference", "test", "says"),
    [
        (noisy(0.2, 2.0), STEADY, ["noisy reference run: the medians differ by 0.", "its slowest sample 10"]),
        ([1.3 * seconds for seconds in STEADY], STEADY, ["a slow reference run: its median is 30% above", "none of its samples"]),
        (
            [1.4 * one for one in STEADY[:60]] + STEADY[60:],
            STEADY,
            ["a slow reference run: its median is 40%", "40% of its samples", "faster"],
        ),
        (STEADY, [16.0] + [0.1] * 99, ["a cache: the test's first sample took 16 s", "the others 0.1 s"]),
        ([], STEADY, ["not known"]),
    ],
)
def test_reasons(reference: list[float], test: list[float], says: list[str]) -> None:
    said = "; ".join(reasons(reference, test, limit=0.2))
    assert [part for part in says if part not in said] == [], said


def test_a_spread_is_numpys() -> None:
    spread = Spread.of(STEADY)
    assert (spread.samples, spread.fastest, spread.slowest) == (100, 16.0, 16.1)
    assert spread.median == pytest.approx(np.median(STEADY)) and spread.p90 == pytest.approx(np.percentile(STEADY, 90))
    assert str(spread) == "100 samples: fastest / median / 90th percentile / slowest 16 / 16.05 / 16.1 / 16.1 s"
