"""An accuracy run of real LoadGen in its own process, for its memory: `python -m tests.sut.accuracy_run FOLDER SAMPLES SIDE`.

The engine is a stand-in that makes frames as fast as it is taken, which no real one does: if memory stays flat here, it does
everywhere. Everything after it is the real thing: the system under test, the videos, LoadGen, its log.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sut import accuracy_log, loadgen
from sut.system import Accuracy, SystemUnderTest
from sut.video_writer import VideoWriter
from wan_mlperf.recipe import CONFIGS
from wan_mlperf.replicas.dispatch import FinishedSample, OnLost, OnResult
from wan_mlperf.replicas.messages import Job
from wan_mlperf.workload import Workload


def frames_of(sample: int, workload: Workload) -> np.ndarray:
    """The frames of a sample, the same whenever they are asked for: a slow gradient, which is cheap to encode."""
    shape = (workload.frames, workload.height, workload.width, 3)
    across = np.arange(workload.width)[:, None] // 2 + np.arange(workload.frames)[:, None, None, None] + [0, 60, 120]
    return np.broadcast_to(across + sample, shape).astype(np.uint8)


class Engine:
    """Stands in for the dispatcher: makes all samples in one thread."""

    on_result: OnResult
    on_lost: OnLost
    thread: threading.Thread

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def submit(self, jobs: Sequence[Job]) -> None:
        """Start making them."""
        self.thread = threading.Thread(target=self._make, args=(list(jobs),))
        self.thread.start()

    def _make(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            # Flat, as frames come from another process.
            frames = frames_of(job.sample, self._workload).reshape(-1)
            self.on_result(FinishedSample(job=job, content=frames, seconds=0.0, spans={}))

    def run(self, test: Callable[[], None]) -> None:
        """Never asked."""

    def serve(self) -> None:
        """Never asked."""


def resident_mb() -> float:
    """This process's memory, MB."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


def fail(*what: Any) -> None:
    """Nothing may go wrong here."""
    raise AssertionError(what)


def main(arguments: Sequence[str]) -> None:
    """Run; print the memory after each sample as JSON."""
    folder, samples, side = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    workload = Workload(height=side, width=side, frames=5, fps=8, steps=1)
    (folder / "videos").mkdir(parents=True)
    accuracy_log.check_space(folder, workload, samples)
    videos = VideoWriter(folder / "videos", workload, on_failure=fail)
    memory: list[float] = []
    engine = Engine(workload)
    system = SystemUnderTest(
        engine,
        [f"prompt {number}" for number in range(samples)],
        accuracy=Accuracy(videos=videos, backlog=accuracy_log.Backlog(folder)),
        on_sample=lambda: memory.append(resident_mb()),
        on_lost=fail,
        on_failure=fail,
    )
    settings = loadgen.make_settings("offline", "accuracy", CONFIGS / "mlperf" / "user.conf", samples)
    loadgen.run(settings, folder=folder, samples=samples, issue=system.issue, flush=system.flush)
    engine.thread.join()  # as `Dispatcher.run` does: the last sample's video is handed over after its response
    videos.close()
    accuracy_log.seal(folder, keep=True)
    memory.append(resident_mb())
    print(json.dumps(memory))


if __name__ == "__main__":
    main(sys.argv[1:])
