"""Writes the MP4s of an accuracy run for VBench, from the same frames that LoadGen got, outside the timed path."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from wan_mlperf.video import write_mp4
from wan_mlperf.workload import Workload

CPUS_PER_WORKER, MOST_WORKERS = 8, 4  # an encoder takes one core for a few seconds per 720p video


class VideoWriter:
    """Encodes in a few threads. It holds at most one video more than it has threads, so memory stays flat.

    `on_failure` gets an error, such as a full disk.
    """

    def __init__(self, folder: Path, workload: Workload, *, on_failure: Callable[[BaseException], None]) -> None:
        self._folder, self._workload, self._on_failure = folder, workload, on_failure
        workers = min(MOST_WORKERS, max(1, (os.cpu_count() or 1) // CPUS_PER_WORKER))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="mp4")
        self._room = threading.Semaphore(workers + 1)

    def add(self, sample: int, content: np.ndarray) -> None:
        """Write the video of a sample, uint8 frames in any shape. Waits while there is no room for another one."""
        self._room.acquire()
        self._pool.submit(self._write, sample, content)

    def close(self) -> None:
        """Wait until every video is written."""
        self._pool.shutdown(wait=True)

    def _write(self, sample: int, content: np.ndarray) -> None:
        workload = self._workload
        try:
            frames = content.reshape(workload.frames, workload.height, workload.width, 3)
            write_mp4(self._folder / f"{sample}.mp4", [frames], workload.fps)
        except BaseException as error:
            self._on_failure(error)
        finally:
            self._room.release()
