"""Faults for the tests: put this folder on PYTHONPATH and say in WAN_MLPERF_TEST_FAULT what should happen on a rank.

`kind@rank[,rank]:first[-last]`: from this rank's attempt number `first` (counting from 0, the warm-up is attempt 0) to `last`.
The product has no such hook: this file changes `Pipeline.stream_batch` from outside, in the ranks only.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

FAULT = os.environ.get("WAN_MLPERF_TEST_FAULT", "")


def install() -> None:
    """Wrap the pipeline's one entrance for prompts."""
    from wan_mlperf.pipeline import Pipeline

    kind, _, rest = FAULT.partition("@")
    ranks, _, attempts = rest.partition(":")
    first, _, last = attempts.partition("-")
    affected = os.environ["RANK"] in ranks.split(",")
    original = Pipeline.stream_batch
    calls = [-1]

    def stream_batch(self: Any, prompts: Any, **kwargs: Any) -> Iterator[Any]:
        calls[0] += 1
        hit = affected and int(first) <= calls[0] <= int(last or first)
        begin = time.perf_counter()
        if hit and kind == "nan":
            for expert in self.experts.values():
                next(expert.parameters()).data.fill_(float("nan"))
        if hit and kind == "raise-early":
            act(kind)
        for number, chunk in enumerate(original(self, prompts, **kwargs)):
            if hit and number == 0:
                act(kind)
            yield chunk * 0 if hit and kind == "flat" else chunk
        if hit and kind == "slow":
            time.sleep(time.perf_counter() - begin)
        if hit and kind == "long":
            time.sleep(1.5)

    Pipeline.stream_batch = stream_batch  # type: ignore[method-assign]


def act(kind: str) -> None:
    """Do it, in the middle of a sample."""
    print(f"test: {kind}", flush=True)
    if kind.startswith("raise"):
        raise MemoryError("out of memory (a test's)")
    if kind in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    if kind == "sleep":
        time.sleep(3600)


def fix_halves() -> None:
    """Instead of pulling, replica r of n takes every n-th sample: what a fixed policy gives."""
    from wan_mlperf.replicas.work_queue import WorkQueue

    def take(self: Any, batch: int = 1, *, wait_s: float = 0.0) -> Any:
        self.mine = getattr(self, "mine", self._replica - self._replicas) + self._replicas
        while not self._store.check([f"job/{self.mine}"]):
            if self._store.check(["stop"]):
                return None
            time.sleep(0.005)
        return [self._job(f"job/{self.mine}")]

    WorkQueue.take = take  # type: ignore[method-assign]


if FAULT and "RANK" in os.environ:
    install()
if os.environ.get("WAN_MLPERF_TEST_HALVES") and "RANK" in os.environ:
    fix_halves()
