"""Forecasts how long a video will still take, from earlier videos or from its own progress."""

from __future__ import annotations

import math
import threading

from wan_mlperf.workload import Workload

WEIGHT = 0.3  # of the newest video in the running mean


class Forecast:
    """Running mean of the seconds per video of each workload. `at_once` is how many videos are made at the same time."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._means: dict[tuple[int, int], float] = {}
        self._newest: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def learn(self, workload: Workload, seconds: float) -> None:
        """Take a finished video into account."""
        key = _key(workload)
        with self._lock:
            self._means[key] = (1 - WEIGHT) * self._means.get(key, seconds) + WEIGHT * seconds
            self._newest = key

    def seconds(self, workload: Workload) -> float | None:
        """Seconds for a whole video; a workload not seen before is scaled by pixels and steps. None before the first video."""
        key = _key(workload)
        with self._lock:
            if self._newest is None:
                return None
            known = key if key in self._means else self._newest
            return self._means[known] * math.prod(key) / math.prod(known)

    def seconds_left(self, workload: Workload, *, share: float, running: float) -> float | None:
        """Seconds that a video still takes after `running` seconds, with `share` of the work done."""
        if share > 0.05:  # its own pace is the best estimate
            return running * (1 - share) / share
        whole = self.seconds(workload)
        return None if whole is None else max(0.0, whole - running)

    def seconds_to_wait(self, workload: Workload, *, before: int) -> float | None:
        """Seconds until a video is finished that has `before` others in front of it."""
        whole = self.seconds(workload)
        return None if whole is None else whole * (before // self._at_once + 1)

    def seconds_to_next(self) -> int:
        """Seconds after which a client should try a full queue again."""
        with self._lock:
            mean = self._means[self._newest] if self._newest else 1.0
        return max(1, min(60, math.ceil(mean / self._at_once)))


def _key(workload: Workload) -> tuple[int, int]:
    return workload.values, workload.steps
