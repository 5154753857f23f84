"""What a schedule may choose, the trials that measure each choice alone, and what they say of a whole schedule.

Errors of independent choices add in quadrature: the squared relative error of the final latents is measured once per (step,
choice) and per reuse edge (a computed step and the steps after it that apply its change again); a schedule's is their sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wan_mlperf.recipe import AttentionName, GemmName, Recipe, parse
from wan_mlperf.step_plan import ExpertName, Step

EXACT_ATTENTION: AttentionName = "sdpa"
EXACT_GEMM: GemmName = "bf16"
LONGEST = 2  # steps in a row that apply one change again: with more, errors no longer add (LeMiCa, arXiv 2511.00090)
FACTORS = (0.9, 1.0, 1.1)  # an edge is tried with these; its squared error is quadratic in the factor
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
        """The recipe with this schedule in place of its own, and with other `changes`, checked."""
        values = dataclasses.asdict(recipe) | changes
        for filled in ("folder", "exact"):
            values.pop(filled)
        values["attention"] |= {"steps": list(self.attention)}
        values["gemm"] |= {"high_noise": self.high_noise, "low_noise": self.low_noise}
        values["guidance"] = {"off": list(self.off)}
        values["reuse"] = {"steps": list(self.reuse), "factors": list(self.factors) or None}
        return dataclasses.replace(parse(values, source="schedule"), folder=recipe.folder)

    def formats(self) -> tuple[GemmName, GemmName]:
        """Both experts' GEMM formats: a pipeline is loaded with one pair."""
        return self.high_noise, self.low_noise


def exact(steps: int) -> Schedule:
    """The schedule without any approximation, which every error is relative to."""
    return Schedule(attention=(EXACT_ATTENTION,) * steps)


def of_recipe(recipe: Recipe, plan: Sequence[Step]) -> Schedule:
    """A recipe's own schedule."""
    return Schedule(
        attention=tuple(step.attention for step in plan),  # type: ignore[misc]
        high_noise=recipe.gemm.high_noise,
        low_noise=recipe.gemm.low_noise,
        off=tuple(step.index for step in plan if not step.guided),
        reuse=tuple(step.index for step in plan if step.source is not None),
        factors=tuple(step.factor for step in plan if step.source is not None),
    )


def edges(plan: Sequence[Step]) -> Iterator[tuple[int, int]]:
    """(computed step, how many after it apply its change), within one expert."""
    for step in plan:
        for length in range(1, LONGEST + 1):
            last = step.index + length
            if last < len(plan) and plan[last].expert == step.expert:
                yield step.index, length


def trials(plan: Sequence[Step], options: Options) -> dict[str, Schedule]:
    """Name -> a schedule that is exact but for one choice."""
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


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Squared relative errors of the final latents, each of one choice alone. An edge also has its best factor."""

    attention: Mapping[tuple[int, str], float]
    gemm: Mapping[tuple[str, str], float]
    unguided: Mapping[int, float]
    edges: Mapping[tuple[int, int], tuple[float, float]]

    @classmethod
    def from_trials(cls, plan: Sequence[Step], options: Options, squares: Mapping[str, float]) -> Errors:
        """From each trial's squared error."""
        return cls(
            attention={
                (step.index, kernel): 0.0 if kernel == EXACT_ATTENTION else squares[f"{step.index} {kernel}"]
                for step in plan
                for kernel in options.attention[step.index]
            },
            gemm={
                (expert, name): 0.0 if name == EXACT_GEMM else squares[f"{expert} {name}"]
                for expert in EXPERTS
                for name in options.gemm(expert)
            },
            unguided={step.index: squares[f"{step.index} unguided"] for step in plan} if options.skip else {},
            edges={
                (first, length): _best_factor([squares[f"{first}+{length} x{factor:g}"] for factor in FACTORS])
                for first, length in edges(plan)
            }
            if options.skip
            else {},
        )

    def square(self, schedule: Schedule, plan: Sequence[Step]) -> float:
        """The squared error that a schedule should have: what its choices have alone, added."""
        total = sum(self.gemm[pair] for pair in zip(EXPERTS, schedule.formats(), strict=True))
        reused = set(schedule.reuse)
        for step in plan:
            if step.index in schedule.off:
                total += self.unguided[step.index]
            if step.index in reused:
                continue
            total += self.attention[step.index, schedule.attention[step.index]]
            length = 0
            while step.index + length + 1 in reused:
                length += 1
            if length:
                total += self._edge(step.index, length)
        return total

    def _edge(self, first: int, length: int) -> float:
        """Of an edge that is longer than any measured: as if its last part began anew, which is too little."""
        known = self.edges.get((first, length))
        return known[0] if known else self.edges[first, LONGEST][0] * (length / LONGEST) ** 2


def _best_factor(squares: Sequence[float]) -> tuple[float, float]:
    """(squared error, factor) at the lowest point of the parabola through the three factors tried, or the best of them."""
    low, middle, high = squares
    curve, width = low - 2 * middle + high, FACTORS[2] - FACTORS[1]
    best = min(zip(squares, FACTORS, strict=True))
    if curve <= 0:
        return best
    shift = (low - high) / (2 * curve)
    if abs(shift) > 1:
        return best
    return max(middle - (low - high) ** 2 / (8 * curve), 0.0), round(FACTORS[1] + shift * width, 4)
