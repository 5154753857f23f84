"""One replica: rank 0 gets the samples, all ranks work on each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from wan_mlperf.replicas.dispatcher import ATTEMPTS, FinishedSample, OnLost, OnProgress, OnResult, Pack, ignore, say_retry
from wan_mlperf.replicas.messages import Job
from wan_mlperf.replicas.replica import CANCELLED, Attempt, Replica
from wan_mlperf.replicas.watch import Watch


class Lockstep:
    """Makes samples in the thread that submits them, which is rank 0's main thread."""

    def __init__(self, replica: Replica, watch: Watch, pack: Pack, *, batch: int) -> None:
        self.on_result: OnResult = ignore
        self.on_lost: OnLost = ignore
        self.on_progress: OnProgress = ignore
        self.capacity = batch
        self._replica, self._watch, self._pack, self._batch = replica, watch, pack, batch
        self._cancelled: set[int] = set()
        replica.report = lambda progress: self.on_progress(progress)
        replica.is_cancelled = self._cancelled.__contains__

    def submit(self, jobs: Sequence[Job]) -> None:
        """Make the videos now, in batches as long as there are enough, and return when all are done."""
        waiting = list(jobs)
        while waiting:
            number = self._batch if len(waiting) >= self._batch else 1
            batch, waiting = waiting[:number], waiting[number:]
            for attempt in self._replica.make(batch):
                if attempt.reason is None:
                    self._finish(attempt)
                elif attempt.job.attempt < ATTEMPTS and attempt.reason != CANCELLED:
                    say_retry(attempt.job, attempt.reason)
                    waiting.insert(0, dataclasses.replace(attempt.job, attempt=attempt.job.attempt + 1))
                else:
                    self.on_lost(attempt.job, attempt.reason)
        self._cancelled -= {job.ticket for job in jobs}

    def cancel(self, ticket: int) -> None:
        """See `ServingDispatcher.cancel`."""
        self._cancelled.add(ticket)

    def stay_ready(self) -> None:
        """See `ServingDispatcher.stay_ready`."""
        self._replica.stay_ready()

    def run(self, test: Callable[[], None]) -> None:
        """Run `test` in this thread."""
        test()
        self._replica.stop()

    def serve(self) -> None:
        """Do what rank 0 asks."""
        self._replica.serve()

    def _finish(self, attempt: Attempt) -> None:
        try:
            content, spans = attempt.content(self._pack)
            self.on_result(FinishedSample(job=attempt.job, content=content, seconds=attempt.seconds, spans=spans))
        except Exception as error:
            self._watch.fail(error, stage="respond", sample=attempt.job.sample)
