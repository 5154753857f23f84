"""The work of all replicas, kept in the job's store: a free replica takes the next sample without asking anyone.

A counter hands out the tickets, so a slower replica takes fewer. Rank 0 posts samples and reads the reports.

The store's own queues (`Store.queue_push`) would save about twenty lines. They need torch 2.8, while this project takes 2.6 as
well; TCPStore's legacy backend does not have them; and their blocking pop holds the connection that rank 0's threads share, so a
replica would have to poll just the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch.distributed import Store

from wan_mlperf.replicas.messages import Done, Job, Lost, Progress, decode, encode
from wan_mlperf.replicas.store import count

POLL_S = 0.02  # how often an idle replica and rank 0 look; one look takes a few round trips of 0.1 ms


class WorkQueue:
    """One replica's view of the queue, and rank 0's. Only the first rank of each replica uses it."""

    def __init__(self, store: Store, *, replica: int, replicas: int) -> None:
        self._store = store
        self._replica = replica
        self._replicas = replicas
        self._tickets: list[int] = []  # claimed before there was a job for them
        self._retries_seen = 0
        self._posted = 0
        self._cancelled: set[int] = set()

    def post(self, jobs: list[Job]) -> None:
        """Rank 0: offer new samples."""
        for job in jobs:
            self._store.set(f"job/{self._posted}", encode([job]))
            self._posted += 1
        self._store.add("posted", len(jobs))

    def retry(self, job: Job) -> None:
        """Rank 0: offer a sample again, to every replica but `job.avoid`."""
        number = count(self._store, "retries")
        self._store.set(f"retry/{number}", encode([job]))
        self._store.add("retries", 1)

    def stop(self) -> None:
        """Rank 0: no sample will follow."""
        self._store.set("stop", "1")

    def cancel(self, ticket: int) -> None:
        """Rank 0: cancel a watched job."""
        self._cancelled.add(ticket)
        self._store.set(f"cancelled/{ticket}", "1")

    def is_cancelled(self, ticket: int) -> bool:
        """True if rank 0 has cancelled this job."""
        return ticket in self._cancelled if self._replica == 0 else bool(self._store.check([f"cancelled/{ticket}"]))

    def forget(self, ticket: int) -> None:
        """Rank 0: a job has ended, so whether it was cancelled no longer matters."""
        if ticket in self._cancelled:
            self._cancelled.discard(ticket)
            self._store.delete_key(f"cancelled/{ticket}")

    def take(self, batch: int = 1, *, wait_s: float = float("inf")) -> list[Job] | None:
        """Wait for work. Returns `batch` samples or one; an empty list if none came within `wait_s`; None when all work is done.

        Towards the end, samples are taken one by one: a batch in one replica would leave the others idle. No other number is
        taken, because each would be one more shape to compile.
        """
        until = time.monotonic() + wait_s
        while True:
            retry = self._take_retry()
            if retry is not None:
                return [retry]
            posted = count(self._store, "posted")
            left = posted - count(self._store, "claimed")
            if not self._tickets and left > 0:
                number = batch if left >= batch * self._replicas else 1
                last = int(self._store.add("claimed", number))
                self._tickets = list(range(last - number, last))
            ready = [ticket for ticket in self._tickets if ticket < posted]
            if ready:
                taken = ready if len(ready) == batch else ready[:1]
                self._tickets = self._tickets[len(taken) :]
                return [self._job(f"job/{ticket}") for ticket in taken]
            if self._store.check(["stop"]):
                return None
            if time.monotonic() > until:
                return []
            time.sleep(POLL_S)

    def report(self, message: Done | Lost | Progress) -> str:
        """Tell rank 0. Returns the report's key, which exists until rank 0 has taken over what the report points to."""
        key = f"report/{int(self._store.add('reports', 1)) - 1}"
        self._store.set(key, encode([message]))
        return key

    def await_closed(self, key: str) -> None:
        """Wait until rank 0 has taken over what the report points to."""
        while self._store.check([key]):
            time.sleep(POLL_S)

    def close(self, key: str) -> None:
        """Rank 0: say that the report's content has been taken over."""
        self._store.delete_key(key)

    def reports(self) -> Iterator[tuple[str, Done | Lost | Progress]]:
        """Rank 0: yield each (key, report) once, as they come, until `stop`."""
        number = 0
        while True:
            key = f"report/{number}"
            if self._store.check([key]):
                (message,) = decode(self._store.get(key))
                assert isinstance(message, Done | Lost | Progress)
                yield key, message
                number += 1
            elif self._store.check(["stop"]):
                return
            else:
                time.sleep(POLL_S)

    def _take_retry(self) -> Job | None:
        offered = count(self._store, "retries")
        while self._retries_seen < offered:
            number = self._retries_seen
            self._retries_seen += 1
            (job,) = decode(self._store.get(f"retry/{number}"))
            assert isinstance(job, Job)
            if job.avoid != self._replica and int(self._store.add(f"retry/{number}/claimed", 1)) == 1:
                return job
        return None

    def _job(self, key: str) -> Job:
        (job,) = decode(self._store.get(key))
        assert isinstance(job, Job)
        self._store.delete_key(key)
        return job
