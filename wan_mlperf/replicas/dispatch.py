"""Who makes which sample: lockstep, where all ranks are one replica, and pull, where each free replica takes the next one.

Both have one interface: rank 0 submits jobs from within `run(test)` and gets every result as it is ready, one by one; every
other rank serves. A sample that fails is tried once more, on another replica if there is one.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from wan_mlperf import process
from wan_mlperf.pipeline import Pipeline
from wan_mlperf.replicas import transport
from wan_mlperf.replicas.messages import Done, Job, Lost
from wan_mlperf.replicas.replica import Attempt, Replica
from wan_mlperf.replicas.store import connect
from wan_mlperf.replicas.transport import Content
from wan_mlperf.replicas.watch import Watch
from wan_mlperf.replicas.work_queue import WorkQueue

ATTEMPTS = 2
IN_HAND = 2  # finished samples that a replica holds while rank 0 takes them over: this bounds its memory

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


def start(pipeline: Pipeline, watch: Watch, *, pack: Pack) -> Dispatcher:
    """Return the dispatcher of this rank, warmed up for every shape that it will meet. Every rank calls it.

    `pack` turns frames into what rank 0 gets; it runs on the rank that made them.
    """
    kind = Lockstep if pipeline.mesh.shape.replicas == 1 else Pull
    dispatcher = kind(Replica(pipeline, watch), watch, pack, batch=pipeline.recipe.offline.batch)
    pipeline.mesh.barrier()
    watch.idle()
    return dispatcher


def _ignore(*_: Any) -> None:
    """Before rank 0's side has said what to do."""


class Lockstep:
    """One replica: rank 0 is asked, all ranks work."""

    def __init__(self, replica: Replica, watch: Watch, pack: Pack, *, batch: int) -> None:
        self.on_result: OnResult = _ignore
        self.on_lost: OnLost = _ignore
        self._replica, self._watch, self._pack, self._batch = replica, watch, pack, batch

    def submit(self, jobs: Sequence[Job]) -> None:
        """Make them now, in batches while there are enough."""
        waiting = list(jobs)
        while waiting:
            number = self._batch if len(waiting) >= self._batch else 1
            batch, waiting = waiting[:number], waiting[number:]
            for attempt in self._replica.make(batch):
                if attempt.reason is None:
                    self._finish(attempt)
                elif attempt.job.attempt < ATTEMPTS:
                    _say_retry(attempt.job, attempt.reason)
                    waiting.insert(0, dataclasses.replace(attempt.job, attempt=attempt.job.attempt + 1))
                else:
                    self.on_lost(attempt.job, attempt.reason)

    def run(self, test: Callable[[], None]) -> None:
        """Run `test` in this thread."""
        test()
        self._replica.stop()

    def serve(self) -> None:
        """Do what rank 0 asks."""
        self._replica.serve()

    def _finish(self, attempt: Attempt) -> None:
        assert attempt.frames is not None
        try:
            content = self._pack(attempt.frames)
            self.on_result(FinishedSample(job=attempt.job, content=content, seconds=attempt.seconds, spans=attempt.spans))
        except Exception as error:
            self._watch.fail(error, stage="respond", sample=attempt.job.sample)


class Pull:
    """Many replicas: a free one takes the next sample.

    On rank 0 the main thread is replica 0 (it holds the device's state), `test` runs in a second thread, and a third takes over
    the results of the other replicas. On the first rank of each replica one more thread packs and hands over finished samples
    while the next one is made.
    """

    def __init__(self, replica: Replica, watch: Watch, pack: Pack, *, batch: int) -> None:
        mesh = replica.pipeline.mesh
        self.on_result: OnResult = _ignore
        self.on_lost: OnLost = _ignore
        self._replica, self._watch, self._pack, self._batch, self._mesh = replica, watch, pack, batch, mesh
        self._group = mesh.message_group()
        self._work = WorkQueue(connect("work"), replica=mesh.replica, replicas=mesh.shape.replicas)
        self._shares_host = transport.shares_host_with_first(self._group)
        self._jobs: dict[int, Job] = {}  # on rank 0: handed out, not finished
        self._one_at_a_time = threading.Lock()
        self._in_hand = threading.Semaphore(IN_HAND * batch)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Offer them to all replicas and return."""
        self._jobs.update((job.ticket, job) for job in jobs)
        self._work.post(list(jobs))

    def run(self, test: Callable[[], None]) -> None:
        """Run `test` in a thread while this rank works as replica 0."""

        def test_then_stop() -> None:
            test()
            self._work.stop()

        threads = [self._thread(test_then_stop), self._thread(self._collect)]
        self.serve()
        for thread in threads:
            thread.join()

    def serve(self) -> None:
        """Work until rank 0 says stop."""
        if not self._mesh.is_replica_first:
            self._replica.serve()
            return
        with ThreadPoolExecutor(1) as hands:
            while (jobs := self._work.take(self._batch)) is not None:
                for attempt in self._replica.make(jobs):
                    self._in_hand.acquire()
                    hands.submit(self._or_fail, self._hand_over, attempt)
        self._replica.stop()

    def _hand_over(self, attempt: Attempt) -> None:
        try:
            if attempt.frames is None:
                assert attempt.reason is not None
                lost = Lost(ticket=attempt.job.ticket, replica=self._mesh.replica, reason=attempt.reason)
                if self._mesh.rank:
                    self._work.report(lost)
                else:
                    self._lost(lost)
                return
            content = self._pack(attempt.frames)
            if not self._mesh.rank:
                self._finished(attempt.job.ticket, content, attempt.seconds, attempt.spans)
                return
            size = len(content) if isinstance(content, bytes) else content.nbytes
            done = Done(ticket=attempt.job.ticket, rank=self._mesh.rank, size=size, seconds=attempt.seconds, spans=attempt.spans)
            if self._shares_host:
                with transport.memory(content) as descriptor:
                    key = self._work.report(dataclasses.replace(done, process=os.getpid(), descriptor=descriptor))
                    self._work.await_closed(key)
            else:
                self._work.report(done)
                transport.send(content, self._group)
        finally:
            self._in_hand.release()

    def _collect(self) -> None:
        for key, report in self._work.reports():
            if isinstance(report, Lost):
                self._work.close(key)
                self._lost(report)
            else:
                content = transport.receive(report, self._group)
                self._work.close(key)
                self._finished(report.ticket, content, report.seconds, report.spans)

    def _finished(self, ticket: int, content: Content, seconds: float, spans: dict[str, float]) -> None:
        job = self._jobs.pop(ticket)
        try:
            with self._one_at_a_time:
                self.on_result(FinishedSample(job=job, content=content, seconds=seconds, spans=spans))
        except Exception as error:
            self._watch.fail(error, stage="respond", sample=job.sample)

    def _lost(self, lost: Lost) -> None:
        with self._one_at_a_time:
            job = self._jobs[lost.ticket]
            if job.attempt >= ATTEMPTS:
                self.on_lost(self._jobs.pop(lost.ticket), lost.reason)
                return
            _say_retry(job, lost.reason)
            job = dataclasses.replace(job, attempt=job.attempt + 1, avoid=lost.replica)
            self._jobs[lost.ticket] = job
            self._work.retry(job)

    def _thread(self, function: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._or_fail, args=(function,), name=function.__name__, daemon=True)
        thread.start()
        return thread

    def _or_fail(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except BaseException as error:
            self._watch.fail(error)


def _say_retry(job: Job, reason: str) -> None:
    process.say(f"sample {job.sample} is tried again: {reason}")
