"""The system under test: LoadGen's samples -> the dispatcher -> LoadGen's responses, and the time they took."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sut import response
from sut.dispatch import Lockstep
from wan_mlperf.video import write_mp4

OnFailure = Callable[[int, BaseException], None]


class System:
    """Answers LoadGen's queries on rank 0.

    In performance mode the response is the frames; in accuracy mode the MP4 that is also kept in `videos` for VBench.
    """

    def __init__(
        self,
        dispatcher: Lockstep,
        prompts: Sequence[str],
        *,
        fps: int,
        videos: Path | None,
        on_sample: Callable[[], None],
        on_failure: OnFailure,
    ) -> None:
        self._dispatcher = dispatcher
        self._prompts = prompts
        self._fps = fps
        self._videos = videos
        self._on_sample = on_sample
        self._on_failure = on_failure
        self._spans: dict[str, list[float]] = defaultdict(list)
        self.generate_s: list[float] = []  # the pipeline's own time per sample
        self.current = -1

    def issue(self, samples: Sequence[Any]) -> None:
        """LoadGen's issue_query. An exception must not travel through LoadGen's C++: `on_failure` ends the run."""
        try:
            for sample in samples:
                self.current = sample.index
                self._answer(sample.id, sample.index)
        except BaseException as error:
            self._on_failure(self.current, error)

    def flush(self) -> None:
        """LoadGen's flush_queries: nothing is held back."""

    @property
    def spans(self) -> dict[str, float]:
        """Mean seconds per stage over the samples so far."""
        return {stage: float(np.mean(values)) for stage, values in self._spans.items()}

    def _answer(self, sample_id: int, index: int) -> None:
        start = time.perf_counter()
        frames = self._dispatcher.make(self._prompts[index])
        self.generate_s.append(time.perf_counter() - start)
        content: np.ndarray | bytes = frames
        if self._videos is not None:
            video = self._videos / f"{index}.mp4"
            write_mp4(video, [frames], self._fps)
            content = video.read_bytes()
        respond = time.perf_counter()
        response.complete(sample_id, content)
        for stage, seconds in self._dispatcher.pipeline.spans.take().items():
            self._spans[stage].append(seconds)
        self._spans["respond"].append(time.perf_counter() - respond)
        self._on_sample()
