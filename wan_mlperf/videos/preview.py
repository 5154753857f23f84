"""Frames -> a stream that a browser plays while it grows: fragmented MP4, encoded at once and so without looking ahead.

It is a second encoding beside the file's: that one's encoder looks 40 frames ahead and gives out nothing before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np

OPTIONS = {"crf": "20", "preset": "ultrafast", "tune": "zerolatency"}
FRAGMENTED = {"movflags": "frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}


class _Sink:
    """A file that can only be written to, and gives out what came since the last time."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, content: bytes) -> int:
        self._parts.append(bytes(content))
        return len(content)

    def take(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)


def fragments(chunks: Iterable[np.ndarray], fps: int) -> Iterator[bytes]:
    """Yield a part of the stream for each chunk of uint8 frames [n, height, width, 3], and its end. Joined they are an MP4."""
    sink = _Sink()
    with av.open(sink, "w", format="mp4", options=FRAGMENTED) as container:
        stream = None
        for chunk in chunks:
            for frame in chunk:
                if stream is None:
                    stream = container.add_stream("libx264", rate=Fraction(fps), options=OPTIONS)
                    stream.height, stream.width = frame.shape[:2]
                    stream.pix_fmt = "yuv420p"
                    stream.thread_count = 1
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            yield sink.take()
        if stream is not None:
            container.mux(stream.encode())
    yield sink.take()
