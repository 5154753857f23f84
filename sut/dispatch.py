"""Who makes which sample: lockstep, where all ranks are one replica and make every sample together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wan_mlperf.pipeline import Pipeline


@dataclass(frozen=True)
class Make:
    """Message to the replica's ranks: make the video of this prompt."""

    prompt: str


@dataclass(frozen=True)
class Stop:
    """Message to the replica's ranks: there is nothing more to do."""


Finished = Callable[[int, np.ndarray], None]


class Lockstep:
    """One replica: the first rank is asked, all ranks work."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    def make(self, prompt: str) -> np.ndarray:
        """On the first rank: return the frames of `prompt`, uint8 [frames, height, width, 3]."""
        self.pipeline.mesh.send_to_replica(Make(prompt))
        frames = self.pipeline.generate(prompt)
        assert frames is not None
        return frames

    def serve(self) -> None:
        """On every other rank: do what the first rank asks until it says stop."""
        while isinstance(message := self.pipeline.mesh.send_to_replica(None), Make):
            self.pipeline.generate(message.prompt)
            self.pipeline.spans.take()

    def stop(self) -> None:
        """On the first rank: let the others go."""
        self.pipeline.mesh.send_to_replica(Stop())
