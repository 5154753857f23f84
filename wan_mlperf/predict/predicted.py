"""What a run's record keeps of its prediction. Not in own_run.py, because reading a result must not wait for torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

STAGES = ("text_encode", "denoise_high", "denoise_low", "vae_decode")
WHOLE = "in all"
SMALL = 0.02  # of the whole: a stage that is off by less is not named


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What the model says of a run on `hardware`: seconds of one video, their band (low, high), and seconds of each stage.

    `apart` are the stages that were measured outside the band, in words. `unknown` says why nothing could be predicted, as for a
    kernel without a published rate; the figures are then empty.
    """

    hardware: str
    seconds: float = 0.0
    band: tuple[float, float] = (0.0, 0.0)
    stages: dict[str, float] = dataclasses.field(default_factory=dict)
    apart: tuple[str, ...] = ()
    unknown: str = ""

    @property
    def text(self) -> str:
        """The whole in one line: the seconds and their band, or why there are none."""
        if self.unknown:
            return f"not predicted: {self.unknown}"
        return f"{self.seconds:.2f} s ({self.band[0]:.2f} to {self.band[1]:.2f} s) on {self.hardware}"

    def beside(self, spans: Mapping[str, float], seconds: float) -> Predicted:
        """Return this with `apart` filled in. `spans`: mean measured seconds per stage of a sample; `seconds`: of a whole one."""
        if self.unknown or not seconds:
            return self
        low, high = (edge / self.seconds for edge in self.band)
        pairs = {WHOLE: (seconds, self.seconds)} | {name: (spans.get(name, 0.0), self.stages[name]) for name in STAGES}
        apart = tuple(
            f"{name.replace('_', ' ')}: {measured:.2f} s measured, {predicted:.2f} s predicted"
            for name, (measured, predicted) in pairs.items()
            if not low * predicted <= measured <= high * predicted and abs(measured - predicted) > SMALL * self.seconds
        )
        return dataclasses.replace(self, apart=apart)
