"""Time per stage of a query, measured without synchronising the device during the query."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

STAGES = ("text_encode", "denoise_high", "denoise_low", "vae_decode", "to_host", "respond")


class Spans:
    """Collects seconds per stage: wall clock on a CPU; events on a GPU, which are read only when the times are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.current = "idle"  # for the message that says where a rank was when it failed
        self.on_stage: Callable[[str], None] = lambda _stage: None  # called for each stage as it is entered
        self._entered = 0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the block to `stage`."""
        self.current = stage
        self._entered += 1
        self.on_stage(stage)
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((stage, begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds[stage] += time.perf_counter() - start

    def progress(self) -> int:
        """A number that changes while this rank makes progress, also while it waits for the GPU. Safe to call from any thread."""
        return self._entered + sum(end.query() for _, _, end in list(self._events))

    def add(self, stage: str, seconds: float) -> None:
        """Add host seconds to a stage."""
        self._seconds[stage] += seconds

    def take(self) -> dict[str, float]:
        """Return the seconds per stage since the last call, and start again from zero."""
        for stage, begin, end in self._events:
            end.synchronize()
            self._seconds[stage] += begin.elapsed_time(end) / 1e3
        taken = dict(self._seconds)
        self._events.clear()
        self._seconds.clear()
        self.current = "idle"
        return taken
