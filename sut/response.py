"""Frames or an MP4 -> LoadGen's response. LoadGen reads the bytes during the call and keeps nothing."""

from __future__ import annotations

import mlperf_loadgen as lg
import numpy as np


def complete(sample_id: int, content: np.ndarray | bytes) -> None:
    """Complete one sample with the bytes of `content`: uncompressed uint8 frames, or in accuracy mode an MP4."""
    buffer = np.frombuffer(content, np.uint8) if isinstance(content, bytes) else np.ascontiguousarray(content)
    lg.QuerySamplesComplete([lg.QuerySampleResponse(sample_id, buffer.ctypes.data, buffer.nbytes)])
