"""What MLCommons published for this benchmark in rounds v6.0 and v6.1: results.json, and how to read it.

The one place for these figures: the report, the predictions and the README take them from here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

FILE = Path(__file__).with_name("results.json")
Harness = Literal["loadgen", "endpoints"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """One system's entry. Times are in seconds; None means not published.

    `score_s` is SingleStream's score: under LoadGen the early-stopping estimate of the 90th percentile, under the endpoints
    harness the mean. The two cannot be compared digit by digit. `source` says where the figures were read.
    """

    round: str
    division: Literal["closed", "open"]
    submitter: str
    accelerator: str
    accelerators: int
    harness: Harness
    score_s: float
    mean_s: float | None
    p90_s: float | None
    p99_s: float | None
    samples_per_second: float | None
    vbench_singlestream: float | None
    vbench_offline: float | None
    how: str
    source: str

    @property
    def system(self) -> str:
        """Submitter, number and kind of accelerator, and the division if it is the open one."""
        return f"{self.submitter}, {self.accelerators}x {self.accelerator}{' (open)' * (self.division == 'open')}"

    @property
    def vbench(self) -> str:
        """The accuracy scores, SingleStream / Offline."""
        return " / ".join(f"{score:.2f}" for score in (self.vbench_singlestream, self.vbench_offline) if score is not None)


@cache
def published() -> tuple[Published, ...]:
    """Return every published result, the newest round first, and in each round the fastest SingleStream first."""
    rows = [_row(values) for values in json.loads(FILE.read_text(encoding="utf-8"))["results"]]
    rows.sort(key=lambda row: row.score_s)
    return tuple(sorted(rows, key=lambda row: row.round, reverse=True))


def _row(values: dict[str, Any]) -> Published:
    single, offline = values.pop("singlestream"), values.pop("offline") or {}
    return Published(
        score_s=single["score_s"],
        mean_s=single["mean_s"],
        p90_s=single["p90_s"],
        p99_s=single["p99_s"],
        samples_per_second=offline.get("samples_per_second"),
        vbench_singlestream=single["vbench"],
        vbench_offline=offline.get("vbench"),
        **values,
    )
