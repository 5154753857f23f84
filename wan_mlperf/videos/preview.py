"""Encodes frames as fragmented MP4, which a browser plays while it is still growing.

This is a second encoding: the encoder of the MP4 file looks 40 frames ahead and returns nothing until then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np

from wan_mlperf.video import COLOURS

OPTIONS = {"crf": "20", "preset": "ultrafast", "tune": "zerolatency", **COLOURS}
FRAGMENTED = {"movflags": "frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}


class _Sink:
    """A write-only file; `take` returns what was written since the last call."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, content: bytes) -> int:
        self._parts.append(bytes(content))
        return len(content)

    def take(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)


def fragments(chunks: Iterable[np.ndarray], fps: int) -> Iterator[bytes]:
    """Yield one piece of MP4 for each chunk of uint8 frames [n, height, width, 3], then the last. Joined, they are an MP4."""
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
