"""The system under test: LoadGen's samples -> the dispatcher -> LoadGen's responses, and the time they took."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sut import response
from sut.accuracy_log import Backlog
from sut.video_writer import VideoWriter
from wan_mlperf.replicas.dispatch import Dispatcher, FinishedSample
from wan_mlperf.replicas.messages import Job


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Where else the frames of an accuracy run go, and what LoadGen still has to write of them."""

    videos: VideoWriter
    backlog: Backlog


class SystemUnderTest:
    """Answers LoadGen's queries on rank 0. The response is the uncompressed frames, in performance and in accuracy mode.

    An accuracy run also needs `accuracy`: its `videos` get the same frames, and its `backlog` keeps LoadGen's log from falling
    behind. `on_lost` gets a sample that failed for good. LoadGen never gets a response for it, so the test cannot end normally.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        prompts: Sequence[str],
        *,
        accuracy: Accuracy | None,
        on_sample: Callable[[], None],
        on_lost: Callable[[Job, str], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        dispatcher.on_result = self._answer
        dispatcher.on_lost = on_lost
        self._dispatcher = dispatcher
        self._prompts = prompts
        self._accuracy = accuracy
        self._on_sample = on_sample
        self._on_failure = on_failure
        self._ids: dict[int, int] = {}  # ticket -> LoadGen's id of the sample, until it is answered
        self._tickets = 0
        self._lock = threading.Lock()
        self._spans: dict[str, list[float]] = defaultdict(list)
        self.generate_s: list[float] = []  # the pipeline's own time per sample

    def issue(self, samples: Sequence[Any]) -> None:
        """LoadGen's issue_query. No exception may pass through LoadGen's C++ code, so `on_failure` ends the run."""
        try:
            jobs = []
            for sample in samples:
                jobs.append(Job(ticket=self._tickets, sample=sample.index, prompt=self._prompts[sample.index]))
                self._ids[self._tickets] = sample.id
                self._tickets += 1
            self._dispatcher.submit(jobs)
        except BaseException as error:
            self._on_failure(error)

    def flush(self) -> None:
        """LoadGen's flush_queries: nothing is held back."""

    @property
    def spans(self) -> dict[str, float]:
        """Mean seconds per stage over the samples so far."""
        with self._lock:
            return {stage: float(np.mean(values)) for stage, values in self._spans.items()}

    def _answer(self, result: FinishedSample) -> None:
        frames = result.content
        assert isinstance(frames, np.ndarray)
        if self._accuracy is not None:
            self._accuracy.backlog.wait()
        respond = time.perf_counter()
        response.complete(self._ids.pop(result.job.ticket), frames)
        with self._lock:
            self.generate_s.append(result.seconds)
            for stage, seconds in {**result.spans, "respond": time.perf_counter() - respond}.items():
                self._spans[stage].append(seconds)
        if self._accuracy is not None:
            self._accuracy.backlog.add(frames.nbytes)
            self._accuracy.videos.add(result.job.sample, frames)
        self._on_sample()
