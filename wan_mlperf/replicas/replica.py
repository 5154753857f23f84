"""One replica as a worker: its first rank is given samples, all its ranks make them, and what came out is checked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from wan_mlperf import process
from wan_mlperf.pipeline import Pipeline
from wan_mlperf.replicas.messages import Job, Stop, decode, encode
from wan_mlperf.replicas.watch import Watch
from wan_mlperf.step_plan import Step

SPARSE = 8  # every eighth row and column tells a picture from a flat one, at a 64th of the reading


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What became of a job: `frames`, uint8 [frames, height, width, 3], or the reason why there are none."""

    job: Job
    frames: np.ndarray | None
    reason: str | None
    seconds: float
    spans: dict[str, float]


class LatentCheck:
    """Which step first gave a value that is no number. It looks without waiting for the device."""

    def __init__(self) -> None:
        self._finite: list[torch.Tensor] = []
        self._steps: list[Step] = []

    def see(self, step: Step, latents: torch.Tensor) -> None:
        """Called after each step with latents [B, ...]."""
        self._steps.append(step)
        self._finite.append(torch.isfinite(latents).flatten(1).all(dim=1))

    def problems(self, count: int) -> list[str | None]:
        """Return what is wrong with each of the `count` samples, None for nothing. The device has finished by now."""
        if not self._finite:
            return [None] * count
        finite = torch.stack(self._finite).cpu().numpy()  # [steps, B]
        found: list[str | None] = []
        for column in finite.T:
            step = self._steps[int(np.argmin(column))]
            problem = f"the latents hold NaN or infinity after step {step.index} ({step.expert} expert)"
            found.append(None if column.all() else problem)
        return found


def flat(frames: np.ndarray) -> bool:
    """True if every frame [frames, height, width, 3] is of one colour: no video that a model makes."""
    return all(_one_colour(frame[::SPARSE, ::SPARSE]) and _one_colour(frame) for frame in frames)


def _one_colour(frame: np.ndarray) -> bool:
    return bool((frame == frame[:1, :1]).all())


class Replica:
    """This rank's share of a replica."""

    def __init__(self, pipeline: Pipeline, watch: Watch) -> None:
        self.pipeline = pipeline
        self._watch = watch

    def make(self, jobs: Sequence[Job]) -> list[Attempt]:
        """On the replica's first rank: make the videos of `jobs` as one batch. A failure is a reason, not an exception."""
        self.pipeline.mesh.send_to_replica(encode(list(jobs)))
        start = time.perf_counter()
        frames, reasons = self._attempt(jobs)
        seconds = (time.perf_counter() - start) / len(jobs)
        spans = {stage: value / len(jobs) for stage, value in self.pipeline.spans.take().items()}
        return [
            Attempt(job=job, frames=None if reason else frames[number], reason=reason, seconds=seconds, spans=spans)
            for number, (job, reason) in enumerate(zip(jobs, reasons, strict=True))
        ]

    def serve(self) -> None:
        """On every other rank of the replica: do what the first asks until it says stop."""
        while jobs := [one for one in decode(self.pipeline.mesh.send_to_replica(None)) if isinstance(one, Job)]:
            self._attempt(jobs)
            self.pipeline.spans.take()

    def stop(self) -> None:
        """On the replica's first rank: let the others go."""
        self.pipeline.mesh.send_to_replica(encode([Stop()]))

    def _attempt(self, jobs: Sequence[Job]) -> tuple[np.ndarray, list[str | None]]:
        """Return frames [B, frames, height, width, 3] and each sample's problem; both are of use on the first rank only."""
        self._watch.begin(", ".join(str(job.sample) for job in jobs))
        frames, error = np.empty(0, np.uint8), None
        problems: list[str | None] = [None for _ in jobs]
        try:
            frames, problems = self._make([job.prompt for job in jobs])
        except Exception as problem:
            if self._watch.is_collective(problem):
                raise
            error = f"{self._watch.where}: {type(problem).__name__}: {process.one_line(problem)[:300]}"
            self._watch.trouble(error)
            if self.pipeline.mesh.device.is_gpu:
                torch.cuda.empty_cache()  # an out-of-memory leaves its fragments in the allocator
        errors = self.pipeline.mesh.errors_on_first(error)
        reasons = [errors[0] if errors else problem and f"{self._watch.where}: {problem}" for problem in problems]
        self._watch.idle()
        return frames, reasons

    def _make(self, prompts: list[str]) -> tuple[np.ndarray, list[str | None]]:
        check = LatentCheck()
        first = self.pipeline.mesh.is_replica_first
        workload = self.pipeline.workload
        frames = np.empty((len(prompts), workload.frames, workload.height, workload.width, 3) if first else 0, np.uint8)
        done = 0
        for chunk in self.pipeline.stream_batch(prompts, on_step=check.see if first else None):
            frames[:, done : done + chunk.shape[1]] = chunk
            done += chunk.shape[1]
        if not first:
            return frames, [None for _ in prompts]
        problems = check.problems(len(prompts))
        for number, video in enumerate(frames):
            if problems[number] is None and flat(video):
                problems[number] = "every frame is of one colour"
        return frames, problems
