"""Run on every rank by test_watched.py: jobs that are watched, cancelled, or of another workload; rank 0 prints what it saw."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from wan_mlperf import Pipeline, load_recipe
from wan_mlperf.preflight import prepare
from wan_mlperf.replicas import dispatch
from wan_mlperf.replicas.dispatcher import FinishedSample
from wan_mlperf.replicas.messages import Job, Progress
from wan_mlperf.replicas.watch import Watch

OTHER = {"height": 48, "width": 80, "frames": 9, "steps": 3}
JOBS = [
    Job(ticket=0, sample=0, prompt="a red circle", watched=True),
    Job(ticket=1, sample=1, prompt="a red circle", seed=7, workload=OTHER, watched=True),
    Job(ticket=2, sample=2, prompt="to be given up", watched=True),
    Job(ticket=3, sample=3, prompt="a red circle"),
    Job(ticket=4, sample=4, prompt="never begun", watched=True),
    Job(ticket=5, sample=5, prompt="a blue square", negative_prompt="red", watched=True),
]
GIVEN_UP = 2
NEVER_BEGUN = 4


def main(file: Path) -> None:
    """Run the jobs by the recipe in `file`."""
    recipe = load_recipe(file)
    with Watch(recipe.faults) as watch:
        engine = Pipeline.load(prepare(recipe))
        watch.follow(engine.spans)
        dispatcher = dispatch.start(engine, watch, pack=lambda frames: frames)
        seen = Seen(dispatcher)
        if engine.mesh.rank:
            dispatcher.serve()
        else:
            dispatcher.run(seen.ask)
    fresh = Pipeline.load(load_recipe(file, overrides=[f"workload.{key}={value}" for key, value in OTHER.items()]))
    expected = fresh.generate("a red circle", seed=7)
    fresh.mesh.close()
    if not engine.mesh.rank:
        assert expected is not None
        other = np.asarray(seen.frames[1]).reshape(expected.shape)
        answer = {"progress": seen.progress, "lost": seen.lost, "done": sorted(seen.frames), "capacity": dispatcher.capacity}
        print(json.dumps({**answer, "other_equal": bool(np.array_equal(other, expected))}))


class Seen:
    """Rank 0's side."""

    def __init__(self, dispatcher: Any) -> None:
        self.progress: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.lost: dict[int, str] = {}
        self.frames: dict[int, Any] = {}
        self._dispatcher = dispatcher
        self._over = threading.Semaphore(0)
        dispatcher.on_progress, dispatcher.on_result, dispatcher.on_lost = self._moved, self._made, self._failed

    def ask(self) -> None:
        """Submit, and wait until something has become of each."""
        self._dispatcher.stay_ready()
        self._dispatcher.cancel(NEVER_BEGUN)
        self._dispatcher.submit(JOBS)
        for _ in JOBS:
            assert self._over.acquire(timeout=120)

    def _moved(self, progress: Progress) -> None:
        self.progress[progress.ticket].append((progress.steps, progress.frames))
        if progress.ticket == GIVEN_UP and progress.steps == 1:
            self._dispatcher.cancel(GIVEN_UP)
            time.sleep(0.01)

    def _made(self, result: FinishedSample) -> None:
        self.frames[result.job.ticket] = np.array(result.content)
        self._over.release()

    def _failed(self, job: Job, reason: str) -> None:
        self.lost[job.ticket] = reason
        self._over.release()
