"""Which division of MLPerf a run belongs to, and which of its choices put it there.

The closed division requires a model equivalent to the reference's: its weights, its initial noise, and every step computed with
both branches of guidance. The numerics of each layer and step, the kernels, the parallelism, and what is algebraically equal
(padding tokens of the text as one, larger chunks in the decoder) are free. The open division also allows leaving out or replacing
work. Source: MLCommons inference_rules, "Model" and "Divisions"; the fixed latent is the default of the reference's
run_mlperf.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from wan_mlperf.recipe import Recipe
from wan_mlperf.step_plan import Step
from wan_mlperf.workload import MLPERF

Name = Literal["closed", "open"]


@dataclass(frozen=True, kw_only=True)
class Division:
    """`reasons` lists each choice that makes a run open, with the recipe's key. It is empty for a closed run."""

    reasons: tuple[str, ...]

    @property
    def name(self) -> Name:
        """The division."""
        return "open" if self.reasons else "closed"


def division_of(recipe: Recipe, plan: Sequence[Step]) -> Division:
    """Return the division of a run of `recipe` whose steps are `plan`."""
    workload = recipe.effective_workload
    reasons = []
    if workload != MLPERF:
        size = f"{workload.frames} frames of {workload.width} x {workload.height} in {workload.steps} steps"
        reasons.append(f"workload: not the benchmark's ({size})")
    if recipe.model.checkpoint == "embedded":
        reasons.append("model.checkpoint: embedded is not the benchmark's model")
    if recipe.model.fixed_latent is None:
        reasons.append(f"model.fixed_latent: the noise is drawn from seed {workload.seed}, not MLCommons' fixed_latent.pt")
    if unguided := [step.index for step in plan if not step.guided and step.source is None]:
        reasons.append(f"guidance: no negative branch in steps {_ranges(unguided)}")
    if reused := [step.index for step in plan if step.source is not None]:
        reasons.append(f"reuse.steps: {_ranges(reused)} apply an earlier step's change instead of running the expert")
    return Division(reasons=tuple(reasons))


def _ranges(numbers: Sequence[int]) -> str:
    """Write 0, 3, 4, 5 as "0, 3 to 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)
