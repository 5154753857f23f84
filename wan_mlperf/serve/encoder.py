"""Encodes a video's MP4 while its frames are decoded: the same bytes as `generate` writes, plus a preview for the page."""

from __future__ import annotations

import base64
import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np

from wan_mlperf.replicas.messages import Job, Progress
from wan_mlperf.replicas.replica import Encoder, Report
from wan_mlperf.video import chunks_to_mp4
from wan_mlperf.videos.preview import fragments


class Abandoned(Exception):
    """No more frames will come, and the result is not wanted."""


class Mp4Encoder:
    """Encodes in a thread that starts with the first frames; with `report`, a second thread encodes the preview."""

    def __init__(self, fps: int, report: Callable[[bytes], None] | None) -> None:
        self._threads = [_Encoding(lambda chunks: chunks_to_mp4(chunks, fps))]
        if report is not None:
            self._threads.append(_Encoding(lambda chunks: _preview(chunks, fps, report)))

    def add(self, frames: np.ndarray) -> None:
        """See `Encoder.add`."""
        for thread in self._threads:
            thread.add(frames)

    def finish(self) -> bytes:
        """See `Encoder.finish`."""
        for thread in self._threads:
            thread.add(None)
        content, *_ = [thread.result() for thread in self._threads]
        return content

    def abandon(self) -> None:
        """See `Encoder.abandon`."""
        for thread in self._threads:
            thread.add(Abandoned())


class _Encoding:
    def __init__(self, encode: Callable[[Iterator[np.ndarray]], bytes]) -> None:
        self._encode = encode
        self._frames: queue.SimpleQueue[np.ndarray | Abandoned | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._content, self._error = b"", None  # type: tuple[bytes, BaseException | None]

    def add(self, frames: np.ndarray | Abandoned | None) -> None:
        self._frames.put(frames)
        if self._thread is None and not isinstance(frames, Abandoned):
            self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)
            self._thread.start()

    def result(self) -> bytes:
        assert self._thread is not None
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._content

    def _run(self) -> None:
        try:
            self._content = self._encode(self._arrived())
        except Abandoned:
            pass
        except BaseException as error:
            self._error = error

    def _arrived(self) -> Iterator[np.ndarray]:
        while (frames := self._frames.get()) is not None:
            if isinstance(frames, Abandoned):
                raise frames
            yield frames


def encode(fps: Callable[[Job], int | None]) -> Callable[[Job, Report], Encoder | None]:
    """Return the `encode` argument of `dispatch.start`. `fps` gives a job's frame rate, None if the job wants frames."""

    def begin(job: Job, report: Report) -> Encoder | None:
        rate = fps(job)
        if rate is None:
            return None

        def send(fragment: bytes) -> None:
            report(Progress(ticket=job.ticket, fragment=base64.b64encode(fragment).decode()))

        return Mp4Encoder(rate, send if job.preview else None)

    return begin


def _preview(chunks: Iterator[np.ndarray], fps: int, report: Callable[[bytes], None]) -> bytes:
    for fragment in fragments(chunks, fps):
        report(fragment)
    return b""
