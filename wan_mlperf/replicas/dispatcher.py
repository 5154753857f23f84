"""The interface through which rank 0 hands out samples, for one replica (Lockstep) or many (Pull), and what both share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from wan_mlperf import process
from wan_mlperf.replicas.messages import Job, Progress
from wan_mlperf.replicas.transport import Content

ATTEMPTS = 2

Pack = Callable[[np.ndarray], Content]


@dataclass(frozen=True, kw_only=True)
class FinishedSample:
    """A finished sample on rank 0: its content (uint8 frames, or what `pack` made of them) and the seconds it took."""

    job: Job
    content: Content
    seconds: float
    spans: dict[str, float]


OnResult = Callable[[FinishedSample], None]
OnLost = Callable[[Job, str], None]
OnProgress = Callable[[Progress], None]


class Dispatcher(Protocol):
    """Hands out samples on rank 0. It may call `on_result` and `on_lost` from any thread, but only one call at a time."""

    on_result: OnResult
    on_lost: OnLost

    def submit(self, jobs: Sequence[Job]) -> None:
        """Rank 0: have these videos made."""

    def run(self, test: Callable[[], None]) -> None:
        """Rank 0: run `test`, which submits jobs and returns when it has all results. Then let the other ranks go."""

    def serve(self) -> None:
        """Every other rank: work until rank 0 is done."""


class ServingDispatcher(Dispatcher, Protocol):
    """Also what a server needs: watched jobs. `on_progress` may be called from any thread.

    `capacity` is how many unfinished jobs should be submitted at a time, so that no replica waits for the next one.
    """

    on_progress: OnProgress
    capacity: int

    def cancel(self, ticket: int) -> None:
        """Rank 0: cancel a watched job, at its next step if it has begun. `on_lost` is called unless it was too late."""

    def stay_ready(self) -> None:
        """Rank 0: keep idle ranks from timing out. To be called about once an hour, from the thread that runs `run`'s test."""


def ignore(*_: object) -> None:
    """Do nothing: the callback until rank 0 sets its own."""


def say_retry(job: Job, reason: str) -> None:
    """Print that a sample failed and is made again."""
    process.say(f"sample {job.sample} is tried again: {reason}")
