"""One replica as a worker: its first rank gets samples, all its ranks make them, and the results are checked."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from wan_mlperf import process
from wan_mlperf.pipeline import Pipeline, Query
from wan_mlperf.recipe import replace_workload
from wan_mlperf.replicas.dispatcher import Pack, ignore
from wan_mlperf.replicas.messages import Job, Progress, StayReady, Stop, decode, encode
from wan_mlperf.replicas.transport import Content
from wan_mlperf.replicas.watch import Watch
from wan_mlperf.step_plan import Step

SPARSE = 8  # checking every eighth row and column first clears most frames at a 64th of the reading
CANCELLED = "cancelled"  # the reason given for a job that rank 0 cancelled


class Encoder(Protocol):
    """Makes a sample's content while its frames are decoded."""

    def add(self, frames: np.ndarray) -> None:
        """Take the next frames, uint8 [n, height, width, 3], without waiting for them to be encoded."""

    def finish(self) -> bytes:
        """Return the content, after all frames were added."""

    def abandon(self) -> None:
        """Release everything: the sample failed or was cancelled."""


Report = Callable[[Progress], None]
Encode = Callable[[Job, Report], Encoder | None]  # None for a job whose frames are packed once they are complete


class Cancelled(Exception):
    """Every job that this replica is making was cancelled: raised on all its ranks at the same step."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at a job: its `frames`, uint8 [frames, height, width, 3], or the `reason` why there are none."""

    job: Job
    frames: np.ndarray | None
    reason: str | None
    seconds: float
    spans: dict[str, float]
    encoder: Encoder | None = None

    def content(self, pack: Pack) -> tuple[Content, dict[str, float]]:
        """Return what rank 0 gets, and the seconds per stage, including the wait for an encoder."""
        assert self.frames is not None
        if self.encoder is None:
            return pack(self.frames), self.spans
        start = time.perf_counter()
        content = self.encoder.finish()
        return content, {**self.spans, "encode": time.perf_counter() - start}


class LatentCheck:
    """Finds the first step that gave NaN or infinity, without waiting for the device."""

    def __init__(self) -> None:
        self._finite: list[torch.Tensor] = []
        self._steps: list[Step] = []

    def see(self, step: Step, latents: torch.Tensor) -> None:
        """Note a step and the latents [B, ...] after it."""
        self._steps.append(step)
        self._finite.append(torch.isfinite(latents).flatten(1).all(dim=1))

    def problems(self, count: int) -> list[str | None]:
        """Return what is wrong with each of the `count` samples, or None. Call it when the device has finished."""
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
    """True if each of the frames [frames, height, width, 3] has a single colour, which no working model makes."""
    return all(_one_colour(frame[::SPARSE, ::SPARSE]) and _one_colour(frame) for frame in frames)


def _one_colour(frame: np.ndarray) -> bool:
    return bool((frame == frame[:1, :1]).all())


class Replica:
    """This rank's share of a replica. On the first rank, `report` gets the progress of watched jobs."""

    def __init__(self, pipeline: Pipeline, watch: Watch, encode: Encode | None = None) -> None:
        self.pipeline = pipeline
        self.report: Report = ignore
        self.is_cancelled: Callable[[int], bool] = lambda _ticket: False
        self._watch = watch
        self._encode = encode

    def make(self, jobs: Sequence[Job]) -> list[Attempt]:
        """On the replica's first rank: make the videos of `jobs`, as one batch if they share one workload.

        A failure gives an attempt with a reason, not an exception.
        """
        attempts: list[Attempt] = []
        for _, alike in itertools.groupby(jobs, key=lambda job: job.workload):
            attempts += self._make_alike(list(alike))
        return attempts

    def serve(self) -> None:
        """On every other rank of the replica: do what the first rank asks, until it says stop."""
        while True:
            messages = decode(self.pipeline.mesh.send_to_replica(None))
            if any(isinstance(one, Stop) for one in messages):
                return
            if jobs := [one for one in messages if isinstance(one, Job)]:
                self._attempt(jobs)
                self.pipeline.spans.take()

    def stay_ready(self) -> None:
        """On the replica's first rank, while there is no work: keep the other ranks from timing out."""
        self.pipeline.mesh.send_to_replica(encode([StayReady()]))

    def stop(self) -> None:
        """On the replica's first rank: let the other ranks go."""
        self.pipeline.mesh.send_to_replica(encode([Stop()]))

    def _make_alike(self, jobs: list[Job]) -> list[Attempt]:
        if all(self._is_given_up(job) for job in jobs):
            return [Attempt(job=job, frames=None, reason=CANCELLED, seconds=0.0, spans={}) for job in jobs]
        self.pipeline.mesh.send_to_replica(encode(list(jobs)))
        start = time.perf_counter()
        attempt = self._attempt(jobs)
        seconds = (time.perf_counter() - start) / len(jobs)
        spans = {stage: value / len(jobs) for stage, value in self.pipeline.spans.take().items()}
        made = []
        for job, frames, reason, encoder in zip(jobs, attempt.frames, attempt.problems, attempt.encoders, strict=True):
            if reason and encoder is not None:
                encoder.abandon()
            made.append(
                Attempt(
                    job=job,
                    frames=None if reason else frames,
                    reason=reason,
                    seconds=seconds,
                    spans=spans,
                    encoder=None if reason else encoder,
                )
            )
        return made

    def _attempt(self, jobs: Sequence[Job]) -> _Batch:
        """Make the frames of `jobs`, or say what is wrong. Only the first rank uses the result."""
        pipeline = self._pipeline_for(jobs[0].workload)
        longer = pipeline.workload.values / self.pipeline.workload.values
        self._watch.begin(", ".join(str(job.sample) for job in jobs), patience=max(1.0, longer) ** 2)
        attempt, error = _Batch(jobs), None
        try:
            self._fill(attempt, pipeline)
        except Cancelled:
            attempt.problems = [CANCELLED for _ in jobs]
        except Exception as problem:
            if self._watch.is_collective(problem):
                raise
            error = f"{self._watch.where}: {type(problem).__name__}: {(process.why(problem) or process.one_line(problem))[:300]}"
            self._watch.trouble(error)
            if self.pipeline.mesh.device.is_gpu:
                torch.cuda.empty_cache()  # after out of memory, the allocator is fragmented
        errors = self.pipeline.mesh.errors_on_first(error)
        if errors:
            attempt.problems = [errors[0] for _ in jobs]
        self._watch.idle()
        return attempt

    def _pipeline_for(self, changes: dict[str, object] | None) -> Pipeline:
        if changes is None:
            return self.pipeline
        return self.pipeline.with_workload(replace_workload(self.pipeline.workload, **changes))

    def _fill(self, attempt: _Batch, pipeline: Pipeline) -> None:
        """Make the frames. The first rank keeps them, hands them to the encoders, and checks them."""
        jobs, first = attempt.jobs, pipeline.mesh.is_replica_first
        check, workload = LatentCheck(), pipeline.workload
        watched = any(job.watched for job in jobs)

        def on_step(step: Step, latents: torch.Tensor) -> None:
            if first:
                check.see(step, latents)
            if watched:
                self._progress(jobs, steps=step.index + 1, frames=0)

        if watched:
            self._progress(jobs, steps=0, frames=0)
        queries = [Query(job.prompt, seed=job.seed, negative_prompt=job.negative_prompt, latent=job.latent) for job in jobs]
        chunks = pipeline.stream_batch(queries, on_step=on_step if first or watched else None)
        if not first:
            # Only the first rank gets chunks. The others follow step by step, and so does a cancellation.
            for _ in chunks:
                pass
            return
        attempt.begin((workload.frames, workload.height, workload.width, 3), self._encode, self.report)
        for chunk in chunks:
            done = attempt.add(chunk)
            if watched:
                self._report(jobs, steps=workload.steps, frames=done)
        problems = check.problems(len(jobs))
        for number, video in enumerate(attempt.frames):
            problem = problems[number] or ("every frame is of one colour" if video is None or flat(video) else None)
            attempt.problems[number] = problem and f"{self._watch.where}: {problem}"

    def _progress(self, jobs: Sequence[Job], *, steps: int, frames: int) -> None:
        """On every rank of the replica, after a step: report it, and raise Cancelled if every job has been cancelled."""
        mesh = self.pipeline.mesh
        if mesh.is_replica_first:
            self._report(jobs, steps=steps, frames=frames)
        if mesh.first_says(mesh.is_replica_first and all(self._is_given_up(job) for job in jobs)):
            raise Cancelled

    def _report(self, jobs: Sequence[Job], *, steps: int, frames: int) -> None:
        for job in jobs:
            if job.watched:
                self.report(Progress(ticket=job.ticket, steps=steps, frames=frames))

    def _is_given_up(self, job: Job) -> bool:
        return job.watched and self.is_cancelled(job.ticket)


class _Batch:
    """The results of `jobs` made as one batch: for each its frames [frames, height, width, 3], problem and encoder."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.frames: Sequence[np.ndarray | None] = [None for _ in jobs]
        self.problems: list[str | None] = [None for _ in jobs]
        self.encoders: list[Encoder | None] = [None for _ in jobs]
        self._done = 0

    def begin(self, shape: tuple[int, ...], encode: Encode | None, report: Report) -> None:
        """Prepare for the first frames."""
        self._all = np.empty((len(self.jobs), *shape), np.uint8)
        self.frames = list(self._all)
        if encode is not None:
            self.encoders = [encode(job, report) for job in self.jobs]

    def add(self, chunk: np.ndarray) -> int:
        """Keep the next frames [B, n, height, width, 3] and have them encoded. Returns how many there are now."""
        begin, self._done = self._done, self._done + chunk.shape[1]
        self._all[:, begin : self._done] = chunk
        for video, encoder in zip(self._all, self.encoders, strict=True):
            if encoder is not None:
                encoder.add(video[begin : self._done])
        return self._done
