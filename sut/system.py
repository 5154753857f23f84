"""The system under test: LoadGen's samples -> the dispatcher -> LoadGen's responses, and the time they took."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sut import response
from wan_mlperf.files import atomic_write
from wan_mlperf.replicas.dispatch import Dispatcher, FinishedSample
from wan_mlperf.replicas.messages import Job
from wan_mlperf.video import to_mp4


class SystemUnderTest:
    """Answers LoadGen's queries on rank 0.

    In performance mode the response is the frames; in accuracy mode the MP4 that is also kept in `videos` for VBench.
    `on_lost` is told of a sample that failed for good: LoadGen never gets a response for it, so the test cannot end by itself.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        prompts: Sequence[str],
        *,
        videos: Path | None,
        on_sample: Callable[[], None],
        on_lost: Callable[[Job, str], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        dispatcher.on_result = self._answer
        dispatcher.on_lost = on_lost
        self._dispatcher = dispatcher
        self._prompts = prompts
        self._videos = videos
        self._on_sample = on_sample
        self._on_failure = on_failure
        self._ids: dict[int, int] = {}  # ticket -> LoadGen's id of the sample, while there is no response
        self._tickets = 0
        self._lock = threading.Lock()
        self._spans: dict[str, list[float]] = defaultdict(list)
        self.generate_s: list[float] = []  # the pipeline's own time per sample

    def issue(self, samples: Sequence[Any]) -> None:
        """LoadGen's issue_query. An exception must not travel through LoadGen's C++: `on_failure` ends the run."""
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
        if self._videos is not None:
            atomic_write(self._videos / f"{result.job.sample}.mp4", bytes(result.content))
        respond = time.perf_counter()
        response.complete(self._ids.pop(result.job.ticket), result.content)
        with self._lock:
            self.generate_s.append(result.seconds)
            for stage, seconds in {**result.spans, "respond": time.perf_counter() - respond}.items():
                self._spans[stage].append(seconds)
        self._on_sample()


def packer(mode: str, fps: int) -> Callable[[np.ndarray], np.ndarray | bytes]:
    """What a sample's frames become where they were made: themselves, or in accuracy mode an MP4."""
    return (lambda frames: to_mp4(frames, fps)) if mode == "accuracy" else (lambda frames: frames)
