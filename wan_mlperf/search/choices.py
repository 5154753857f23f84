"""What a schedule may choose, the trials that measure each choice alone, and what they predict for a whole schedule.

The effect of a choice on the final latents is measured once per (step, choice), and per reuse edge (a computed step and the steps
after it that apply its change again). The latents follow small changes linearly, so the effects of a schedule's choices add up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wan_mlperf.recipe import AttentionName, GemmName, Recipe, parse
from wan_mlperf.step_plan import ExpertName, Step

EXACT_ATTENTION: AttentionName = "sdpa"
EXACT_GEMM: GemmName = "bf16"
LONGEST = 2  # steps in a row that apply one change again: with more, errors no longer add (LeMiCa, arXiv 2511.00090)
FACTORS = (0.9, 1.1)  # an edge is tried with these
LEAST_FACTOR, MOST_FACTOR = 0.7, 1.3
EXPERTS: tuple[ExpertName, ExpertName] = ("high_noise", "low_noise")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What may be chosen: the attention kernels of each step, pairs of GEMM formats, and whether to skip work (open division)."""

    attention: tuple[tuple[AttentionName, ...], ...]
    formats: tuple[tuple[GemmName, GemmName], ...]
    skip: bool

    def gemm(self, expert: ExpertName) -> tuple[GemmName, ...]:
        """The formats that one expert may have."""
        return tuple(dict.fromkeys(pair[EXPERTS.index(expert)] for pair in self.formats))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One schedule, as a recipe would say it."""

    attention: tuple[AttentionName, ...]
    high_noise: GemmName = EXACT_GEMM
    low_noise: GemmName = EXACT_GEMM
    off: tuple[int, ...] = ()
    reuse: tuple[int, ...] = ()
    factors: tuple[float, ...] = ()

    def in_recipe(self, recipe: Recipe, **changes: Any) -> Recipe:
        """Return the recipe with this schedule instead of its own, and with other `changes`, checked."""
        values = dataclasses.asdict(recipe) | changes
        for filled in ("folder", "exact"):
            values.pop(filled)
        values["attention"] |= {"steps": list(self.attention)}
        values["gemm"] |= {"high_noise": self.high_noise, "low_noise": self.low_noise}
        if self.formats() == (EXACT_GEMM, EXACT_GEMM):
            values["gemm"] |= {"keep": []}  # no layer of an exact model has a format
        values["guidance"] = {"off": list(self.off)}
        values["reuse"] = {"steps": list(self.reuse), "factors": list(self.factors) or None}
        return dataclasses.replace(parse(values, source="schedule"), folder=recipe.folder)

    def formats(self) -> tuple[GemmName, GemmName]:
        """Both experts' GEMM formats: a pipeline is loaded with one pair."""
        return self.high_noise, self.low_noise


def exact(steps: int) -> Schedule:
    """Return the schedule without any approximation, to which every error is relative."""
    return Schedule(attention=(EXACT_ATTENTION,) * steps)


def of_recipe(recipe: Recipe, plan: Sequence[Step]) -> Schedule:
    """Return a recipe's own schedule."""
    return Schedule(
        attention=tuple(step.attention for step in plan),  # type: ignore[misc]
        high_noise=recipe.gemm.high_noise,
        low_noise=recipe.gemm.low_noise,
        off=tuple(step.index for step in plan if not step.guided),
        reuse=tuple(step.index for step in plan if step.source is not None),
        factors=tuple(step.factor for step in plan if step.source is not None),
    )


def edges(plan: Sequence[Step]) -> Iterator[tuple[int, int]]:
    """Return (computed step, number of steps after it that apply its change), within one expert."""
    for step in plan:
        for length in range(1, LONGEST + 1):
            last = step.index + length
            if last < len(plan) and plan[last].expert == step.expert:
                yield step.index, length


def trials(plan: Sequence[Step], options: Options) -> dict[str, Schedule]:
    """Return name -> a schedule that is exact except for one choice."""
    base = exact(len(plan))
    found: dict[str, Schedule] = {}
    for expert in EXPERTS:
        for name in options.gemm(expert):
            if name != EXACT_GEMM:
                changed: dict[str, Any] = {expert: name}
                found[f"{expert} {name}"] = dataclasses.replace(base, **changed)
    for step in plan:
        for kernel in options.attention[step.index]:
            if kernel != EXACT_ATTENTION:
                attention = (*base.attention[: step.index], kernel, *base.attention[step.index + 1 :])
                found[f"{step.index} {kernel}"] = dataclasses.replace(base, attention=attention)
    if options.skip:
        for step in plan:
            found[f"{step.index} unguided"] = dataclasses.replace(base, off=(step.index,))
        for first, length in edges(plan):
            reuse = tuple(range(first + 1, first + 1 + length))
            for factor in FACTORS:
                schedule = dataclasses.replace(base, reuse=reuse, factors=(factor,) * length)
                found[f"{first}+{length} x{factor:g}"] = schedule
    return found


# A choice that has an error: ("attention", step, kernel), ("gemm", expert, format), ("unguided", step), ("edge", step, length).
Choice = tuple[Any, ...]


class Errors:
    """What each choice alone does to the final latents, as one vector per choice, relative to the exact ones.

    The vectors of several prompts are concatenated, so a squared length is the mean squared relative error. Steps without
    guidance pull the latents in the same direction, so their vectors add up; for unrelated choices the squares add up.
    """

    def __init__(self, vectors: Mapping[Choice, np.ndarray], factors: Mapping[tuple[int, int], float]) -> None:
        self._place = {choice: number for number, choice in enumerate(vectors)}
        stacked = np.stack(list(vectors.values())) if vectors else np.zeros((0, 1))
        self._products: np.ndarray = (stacked @ stacked.T).astype(float)
        self.factors = dict(factors)

    @classmethod
    def from_trials(cls, plan: Sequence[Step], options: Options, made: Mapping[str, np.ndarray]) -> Errors:
        """Make it from each trial's difference from the exact latents, all of the same length."""
        vectors: dict[Choice, np.ndarray] = {}
        for expert in EXPERTS:
            for name in options.gemm(expert):
                if name != EXACT_GEMM:
                    vectors["gemm", expert, name] = made[f"{expert} {name}"]
        for step in plan:
            for kernel in options.attention[step.index]:
                if kernel != EXACT_ATTENTION:
                    vectors["attention", step.index, kernel] = made[f"{step.index} {kernel}"]
        factors = {}
        if options.skip:
            for step in plan:
                vectors["unguided", step.index] = made[f"{step.index} unguided"]
            for first, length in edges(plan):
                low, high = (made[f"{first}+{length} x{factor:g}"] for factor in FACTORS)
                factors[first, length], vectors["edge", first, length] = _best_factor(low, high)
        return cls(vectors, factors)

    def of(self, schedule: Schedule, plan: Sequence[Step]) -> list[Choice]:
        """The choices of a schedule that have an error."""
        found: list[Choice] = [("gemm", *pair) for pair in zip(EXPERTS, schedule.formats(), strict=True) if pair[1] != EXACT_GEMM]
        reused = set(schedule.reuse)
        for step in plan:
            if step.index in schedule.off:
                found.append(("unguided", step.index))
            if step.index in reused:
                continue
            if schedule.attention[step.index] != EXACT_ATTENTION:
                found.append(("attention", step.index, schedule.attention[step.index]))
            length = 0
            while step.index + length + 1 in reused:
                length += 1
            if length:
                found.append(("edge", step.index, length))
        return found

    def square(self, choices: Sequence[Choice]) -> float:
        """Return the squared error of these choices together. Raises KeyError for one that was not measured."""
        places = [self._place[choice] for choice in choices]
        return max(float(self._products[np.ix_(places, places)].sum()), 0.0)

    def weights(self, around: Sequence[Choice] = ()) -> dict[Choice, float]:
        """Return what each choice adds to the squared error: alone, or together with the choices `around` it, of other steps."""
        found = {choice: float(self._products[place, place]) for choice, place in self._place.items()}
        for choice, place in self._place.items():
            for other in around:
                if not _touches(choice, other):
                    found[choice] += 2 * float(self._products[place, self._place[other]])
        return found


def _touches(one: Choice, other: Choice) -> bool:
    """True for two choices of which a schedule has one or the other, or which are of the same step."""
    if "gemm" in (one[0], other[0]):
        return one[:2] == other[:2]
    return bool(_steps(one) & _steps(other))


def _steps(choice: Choice) -> set[int]:
    return set(range(choice[1], choice[1] + (choice[2] if choice[0] == "edge" else 0) + 1))


def _best_factor(low: np.ndarray, high: np.ndarray) -> tuple[float, np.ndarray]:
    """Return (factor, vector) with the least error: the latents depend linearly on the factor, and two were tried."""
    change = high - low
    share = float(-(low @ change) / max(float(change @ change), 1e-30))
    width = FACTORS[1] - FACTORS[0]
    factor = min(max(FACTORS[0] + share * width, LEAST_FACTOR), MOST_FACTOR)
    factor = round(factor, 4)
    return factor, low + change * ((factor - FACTORS[0]) / width)
