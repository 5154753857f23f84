"""An unfinished job as the desk keeps it, and what becomes of it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from wan_mlperf.replicas.messages import Job
from wan_mlperf.step_plan import Step
from wan_mlperf.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished video and its seconds per stage, including `wait` (in the queue) and `keep` (writing to disk)."""

    content: bytes
    spans: dict[str, float]


@dataclass(kw_only=True, eq=False)
class Task:
    """The live state of an unfinished job; what must survive a restart is in the book."""

    video_id: str
    job: Job
    workload: Workload
    plan: tuple[Step, ...]
    held: bool
    accepted: float
    handed_over: float | None = None  # by time.perf_counter, like `accepted` and `begun`
    begun: float | None = None
    steps: int = 0
    frames: int = 0
    fragments: list[bytes] = field(default_factory=list)
    is_over: bool = False
    outcome: Future[Outcome] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.outcome.set_running_or_notify_cancel()  # a client that goes away cancels its wait, not this

    @property
    def share(self) -> float:
        """Progress from 0 to 1. The decode counts as much as a tenth of the steps."""
        steps = self.workload.steps
        decode = max(1.0, steps / 10)
        return (self.steps + decode * self.frames / self.workload.frames) / (steps + decode)
