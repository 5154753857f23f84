"""`wan_mlperf.run` with a pipeline that keeps the frames of every prompt, which the rules forbid and TEST04 must find."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from wan_mlperf import process, run
from wan_mlperf.pipeline import Pipeline, Query

honest = Pipeline.stream_batch
kept: dict[tuple[str | Query, ...], list[np.ndarray]] = {}


def stream_batch(self: Pipeline, prompts: Sequence[str | Query], **options: Any) -> Iterator[np.ndarray]:
    """Make a video once, and return it again whenever it is asked for."""
    key = tuple(prompts)
    if key not in kept:
        kept[key] = list(honest(self, prompts, **options))
    yield from kept[key]


if __name__ == "__main__":
    Pipeline.stream_batch = stream_batch  # type: ignore[method-assign]
    process.entry(run.main)
