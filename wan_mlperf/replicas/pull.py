"""Many replicas: whichever is free takes the next sample."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from wan_mlperf.replicas import transport
from wan_mlperf.replicas.dispatcher import ATTEMPTS, FinishedSample, OnLost, OnProgress, OnResult, Pack, ignore, say_retry
from wan_mlperf.replicas.messages import Done, Job, Lost, Progress
from wan_mlperf.replicas.replica import CANCELLED, Attempt, Replica
from wan_mlperf.replicas.store import connect
from wan_mlperf.replicas.transport import Content
from wan_mlperf.replicas.watch import Watch
from wan_mlperf.replicas.work_queue import WorkQueue

IN_HAND = 2  # finished samples that a replica keeps until rank 0 has taken them over: this bounds its memory
STAY_READY_S = 3600.0  # how long the other ranks of an idle replica wait until they hear from its first rank


class Pull:
    """Hands samples to replicas as they ask for them.

    On rank 0 the main thread is replica 0 (it holds the device's state), `test` runs in a second thread, and a third takes over
    the results of the other replicas. On the first rank of each replica, one more thread packs and hands over finished samples
    while the next one is made.
    """

    def __init__(self, replica: Replica, watch: Watch, pack: Pack, *, batch: int) -> None:
        mesh = replica.pipeline.mesh
        self.on_result: OnResult = ignore
        self.on_lost: OnLost = ignore
        self.on_progress: OnProgress = ignore
        self.capacity = 2 * batch * mesh.shape.replicas  # twice what is being made: the next are taken without a round trip
        self._replica, self._watch, self._pack, self._batch, self._mesh = replica, watch, pack, batch, mesh
        self._group = mesh.message_group()
        self._work = WorkQueue(connect("work"), replica=mesh.replica, replicas=mesh.shape.replicas)
        self._shares_host = transport.shares_host_with_first(self._group)
        self._jobs: dict[int, Job] = {}  # on rank 0: handed out, not finished
        self._one_at_a_time = threading.Lock()
        self._in_hand = threading.Semaphore(IN_HAND * batch)
        replica.is_cancelled = self._work.is_cancelled
        replica.report = self._report if mesh.rank else lambda progress: self.on_progress(progress)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Offer the jobs to all replicas and return at once."""
        self._jobs.update((job.ticket, job) for job in jobs)
        self._work.post(list(jobs))

    def cancel(self, ticket: int) -> None:
        """See `ServingDispatcher.cancel`."""
        self._work.cancel(ticket)

    def stay_ready(self) -> None:
        """Nothing to do: each replica's first rank takes care of its own ranks."""

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
            while (jobs := self._work.take(self._batch, wait_s=STAY_READY_S)) is not None:
                if not jobs:
                    self._replica.stay_ready()
                    continue
                for attempt in self._replica.make(jobs):
                    self._in_hand.acquire()
                    hands.submit(self._or_fail, self._hand_over, attempt)
        self._replica.stop()

    def _report(self, progress: Progress) -> None:
        self._work.report(progress)

    def _hand_over(self, attempt: Attempt) -> None:
        try:
            if attempt.frames is None:
                assert attempt.reason is not None
                reason = attempt.reason
                lost = Lost(ticket=attempt.job.ticket, replica=self._mesh.replica, reason=reason, cancelled=reason == CANCELLED)
                if self._mesh.rank:
                    self._work.report(lost)
                else:
                    self._lost(lost)
                return
            content, spans = attempt.content(self._pack)
            if not self._mesh.rank:
                self._finished(attempt.job.ticket, content, attempt.seconds, spans)
                return
            size = len(content) if isinstance(content, bytes) else content.nbytes
            done = Done(ticket=attempt.job.ticket, rank=self._mesh.rank, size=size, seconds=attempt.seconds, spans=spans)
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
            if isinstance(report, Progress):
                self._work.close(key)
                self.on_progress(report)
            elif isinstance(report, Lost):
                self._work.close(key)
                self._lost(report)
            else:
                content = transport.receive(report, self._group)
                self._work.close(key)
                self._finished(report.ticket, content, report.seconds, report.spans)

    def _finished(self, ticket: int, content: Content, seconds: float, spans: dict[str, float]) -> None:
        job = self._jobs.pop(ticket)
        self._work.forget(ticket)
        try:
            with self._one_at_a_time:
                self.on_result(FinishedSample(job=job, content=content, seconds=seconds, spans=spans))
        except Exception as error:
            self._watch.fail(error, stage="respond", sample=job.sample)

    def _lost(self, lost: Lost) -> None:
        with self._one_at_a_time:
            job = self._jobs[lost.ticket]
            if job.attempt >= ATTEMPTS or lost.cancelled:
                self._work.forget(lost.ticket)
                self.on_lost(self._jobs.pop(lost.ticket), lost.reason)
                return
            say_retry(job, lost.reason)
            job = dataclasses.replace(job, attempt=job.attempt + 1, avoid=lost.replica)
            self._jobs[lost.ticket] = job
            self._work.retry(job)

    def _thread(self, function: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._or_fail, args=(function,), name=function.__name__, daemon=True)
        thread.start()
        return thread

    def _or_fail(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            function(*arguments)
        except BaseException as error:
            self._watch.fail(error)
