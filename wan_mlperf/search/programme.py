"""The best schedules for every budget: an exact dynamic programme over the steps, from the last to the first.

A segment is one computed step and the steps after it that apply its change again. From each step on, the schedules that no other
one beats in both cost and error are kept, for every pair of GEMM formats. The programme needs errors that add up: first each
choice's own squared error; then, a few times over, what the choice adds to the others of a schedule found so far.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from wan_mlperf.errors import BadInput
from wan_mlperf.recipe import AttentionName, GemmName
from wan_mlperf.search.choices import EXACT_ATTENTION, EXPERTS, Choice, Errors, Options, Schedule
from wan_mlperf.step_plan import Step

Price = Callable[[Step], float]
T = TypeVar("T")
GRID = 5_000  # costs are rounded to 1 / GRID of the most expensive schedule's
ROUNDS, STARTS = 3, 8  # how often, and from how many schedules, the weights are computed again


@dataclass(frozen=True, kw_only=True)
class Point:
    """A schedule, what it costs (steps only) and the squared error that its choices add up to."""

    cost: float
    square: float
    schedule: Schedule

    @property
    def error(self) -> float:
        """The relative error of the final latents."""
        return float(self.square**0.5)


@dataclass(frozen=True)
class _Segment:
    first: int
    attention: AttentionName
    guided: bool
    length: int  # of the reuse edge, 0 without


@dataclass(frozen=True)
class _Tail:
    """The rest of a schedule, from one step on, as a linked list."""

    cost: float
    square: float
    segment: _Segment | None = None
    rest: _Tail | None = None


def front(plan: Sequence[Step], options: Options, errors: Errors, price: Price, *, worst_edge: float) -> list[Point]:
    """Return the schedules found that none of the others beats in both cost and error, cheapest first.

    `plan` is any plan of the workload (only its experts matter), and `price` gives the cost of one step of a plan. A reuse edge
    whose own error is above `worst_edge` is never taken.
    """
    problem = _Problem(plan, options, errors, price, worst_edge)
    points = problem.solve(options.formats, errors.weights())
    for _ in range(ROUNDS):
        best = _unbeaten(points, _by_cost)
        places = sorted({round(place) for place in np.linspace(0, len(best) - 1, STARTS)})
        for start in [best[place] for place in places]:
            points += problem.solve([start.schedule.formats()], errors.weights(errors.of(start.schedule, plan)))
    return _unbeaten(points, _by_cost)


def _by_cost(point: Point) -> tuple[float, float]:
    return point.cost, point.square


def choose(points: Sequence[Point], *, cost: float | None = None, error: float | None = None) -> Point:
    """Return the point with the least error for a cost, or the least cost for an error. Raises BadInput if there is none."""
    if cost is not None:
        within = [point for point in points if point.cost <= cost * (1 + 1e-9)]
        if not within:
            raise BadInput(f"no schedule is that cheap: {cost:.4g} for the steps; allowed: from {points[0].cost:.4g}")
        return min(within, key=lambda point: (point.square, point.cost))
    assert error is not None
    precise = [point for point in points if point.error <= error]
    if not precise:
        raise BadInput(f"--error: {error:g} is below what any schedule has; allowed: from {points[-1].error:.3g}")
    return min(precise, key=lambda point: (point.cost, point.square))


@dataclass(frozen=True)
class _Problem:
    """What the programme is given."""

    plan: Sequence[Step]
    options: Options
    errors: Errors
    price: Price
    worst_edge: float

    def solve(self, pairs: Iterable[tuple[GemmName, GemmName]], weights: Mapping[Choice, float]) -> list[Point]:
        """Return the best schedules by these weights, with their real cost and their joint error."""
        points = []
        alone = self.errors.weights()

        def allowed(first: int, length: int) -> bool:
            return alone["edge", first, length] <= self.worst_edge**2

        lengths = [
            [0, *(length for begin, length in self.errors.factors if begin == step.index and allowed(begin, length))]
            for step in self.plan
        ]
        for formats in pairs:
            for tail in self._tails(formats, weights, lengths):
                schedule = _schedule(tail, formats, self.errors)
                square = self.errors.square(self.errors.of(schedule, self.plan))
                points.append(Point(cost=tail.cost, square=square, schedule=schedule))
        return points

    def _tails(
        self, formats: tuple[GemmName, GemmName], weights: Mapping[Choice, float], lengths: Sequence[Sequence[int]]
    ) -> list[_Tail]:
        gemm = dict(zip(EXPERTS, formats, strict=True))
        steps = [replace(step, gemm=gemm[step.expert], source=None, kept=False, guided=True) for step in self.plan]
        kernels = self.options.attention
        dearest = sum(max(self.price(replace(step, attention=kernel)) for kernel in kernels[step.index]) for step in steps)
        guidance = (True, False) if self.options.skip else (True,)
        tails: list[list[_Tail]] = [[] for _ in steps] + [[_Tail(0.0, 0.0)]]
        for first in reversed(range(len(steps))):
            found = []
            for attention, guided, length in itertools.product(kernels[first], guidance, lengths[first]):
                segment = _Segment(first, attention, guided, length)
                cost, square = self._worth(segment, steps, weights)
                for rest in tails[first + 1 + length]:
                    found.append(_Tail(rest.cost + cost, rest.square + square, segment, rest))
            tails[first] = _unbeaten(found, lambda tail: (round(tail.cost / dearest * GRID), tail.square))
        return tails[0]

    def _worth(self, segment: _Segment, steps: Sequence[Step], weights: Mapping[Choice, float]) -> tuple[float, float]:
        """Return cost and weight of a segment. Steps that apply an unguided step's change have no guidance either."""
        first, attention = segment.first, segment.attention
        step = replace(steps[first], attention=attention, guided=segment.guided)
        covered = range(first, first + segment.length + 1)
        cost = self.price(step) + sum(self.price(replace(step, index=index, source=first)) for index in covered[1:])
        square = 0.0 if attention == EXACT_ATTENTION else weights["attention", first, attention]
        if segment.length:
            square += weights["edge", first, segment.length]
        if not segment.guided:
            square += sum(weights["unguided", index] for index in covered)
        return cost, square


def _unbeaten(found: list[T], key: Callable[[T], tuple[float, float]]) -> list[T]:
    kept: list[T] = []
    lowest = float("inf")
    for one in sorted(found, key=key):
        if key(one)[1] < lowest:
            kept.append(one)
            lowest = key(one)[1]
    return kept


def _schedule(tail: _Tail, formats: tuple[GemmName, GemmName], errors: Errors) -> Schedule:
    attention: list[AttentionName] = []
    off: list[int] = []
    reuse: list[int] = []
    factors: list[float] = []
    while tail.segment is not None:
        segment = tail.segment
        covered = range(segment.first, segment.first + segment.length + 1)
        attention += [segment.attention] * len(covered)
        reuse += covered[1:]
        if segment.length:
            factors += [errors.factors[segment.first, segment.length]] * segment.length
        if not segment.guided:
            off += covered
        assert tail.rest is not None
        tail = tail.rest
    return Schedule(
        attention=tuple(attention),
        high_noise=formats[0],
        low_noise=formats[1],
        off=tuple(off),
        reuse=tuple(reuse),
        factors=tuple(factors),
    )
