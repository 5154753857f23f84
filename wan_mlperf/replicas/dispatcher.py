"""What rank 0's side of a job uses, whatever the number of replicas: the interface of Lockstep and Pull, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from wan_mlperf import process
from wan_mlperf.replicas.messages import Job, Progress
from wan_mlperf.replicas.transport import Content

ATTEMPTS = 2

Pack = Callable[[np.ndarray], Content]


@dataclass(frozen=True, kw_only=True)
class FinishedSample:
    """A finished sample on rank 0: its content, uint8 frames or what `pack` made of them, and the seconds it took."""

    job: Job
    content: Content
    seconds: float
    spans: dict[str, float]


OnResult = Callable[[FinishedSample], None]
OnLost = Callable[[Job, str], None]
OnProgress = Callable[[Progress], None]


class Dispatcher(Protocol):
    """What rank 0's side of a job uses. `on_result` and `on_lost` may be called from any thread, one call at a time."""

    on_result: OnResult
    on_lost: OnLost

    def submit(self, jobs: Sequence[Job]) -> None:
        """Rank 0: have these made."""

    def run(self, test: Callable[[], None]) -> None:
        """Rank 0: run `test`, which submits and returns when it has all results; then let the other ranks go."""

    def serve(self) -> None:
        """Every other rank: work until rank 0 is done."""


class ServingDispatcher(Dispatcher, Protocol):
    """What a server needs besides: watched jobs. `on_progress` may be called from any thread.

    `capacity` is how many jobs should be submitted and not finished, so that no replica waits for the next one.
    """

    on_progress: OnProgress
    capacity: int

    def cancel(self, ticket: int) -> None:
        """Rank 0: give up a watched job, at its next step if it has begun. `on_lost` tells of it unless it was too late."""

    def stay_ready(self) -> None:
        """Rank 0: nothing to do; to be called from the thread of `run`'s test once an hour or so."""


def ignore(*_: Any) -> None:
    """Before rank 0's side has said what to do."""


def say_retry(job: Job, reason: str) -> None:
    """Tell people that a sample failed and is made again."""
    process.say(f"sample {job.sample} is tried again: {reason}")
