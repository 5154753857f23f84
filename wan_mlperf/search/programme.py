"""The best schedules for every budget: an exact dynamic programme over the steps, from the last to the first.

A segment is one computed step with the steps after it that apply its change again. From each step on, the schedules that no other
beats in both cost and squared error are kept; two expert formats are tried in turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from wan_mlperf.errors import BadInput
from wan_mlperf.recipe import AttentionName, GemmName
from wan_mlperf.search.choices import EXPERTS, Errors, Options, Schedule
from wan_mlperf.step_plan import Step

Price = Callable[[Step], float]
T = TypeVar("T")
GRID = 20_000  # costs are told apart to this part of the dearest schedule's


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
    """The rest of a schedule from one step on, as a linked list."""

    cost: float
    square: float
    segment: _Segment | None = None
    rest: _Tail | None = None


def front(plan: Sequence[Step], options: Options, errors: Errors, price: Price, *, worst_edge: float) -> list[Point]:
    """Return the schedules that none beats in both cost and error, cheapest first.

    `plan` is any plan of the workload (its experts count), `price` the cost of one step of a plan; a reuse edge whose own error
    is above `worst_edge` is never taken.
    """
    points: list[Point] = []
    for formats in options.formats:
        offset = sum(errors.gemm[pair] for pair in zip(EXPERTS, formats, strict=True))
        for tail in _tails(plan, options, errors, price, formats, worst_edge):
            points.append(Point(cost=tail.cost, square=tail.square + offset, schedule=_schedule(tail, plan, formats, errors)))
    return [point for point in _unbeaten(points, lambda point: (point.cost, point.square))]


def choose(points: Sequence[Point], *, cost: float | None = None, error: float | None = None) -> Point:
    """The point of least error within a cost, or of least cost within an error. Raises BadInput where there is none."""
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


def _tails(
    plan: Sequence[Step], options: Options, errors: Errors, price: Price, formats: tuple[GemmName, GemmName], worst_edge: float
) -> list[_Tail]:
    gemm = dict(zip(EXPERTS, formats, strict=True))
    steps = [replace(step, gemm=gemm[step.expert], source=None, kept=False, guided=True) for step in plan]
    dearest = sum(max(price(replace(step, attention=kernel)) for kernel in options.attention[step.index]) for step in steps)
    tails: list[list[_Tail]] = [[] for _ in steps] + [[_Tail(0.0, 0.0)]]
    for first in reversed(range(len(steps))):
        found = []
        for segment in _segments(steps, first, options, errors, worst_edge):
            cost, square = _worth(segment, steps, errors, price)
            for rest in tails[first + 1 + segment.length]:
                found.append(_Tail(rest.cost + cost, rest.square + square, segment, rest))
        tails[first] = _unbeaten(found, lambda tail: (round(tail.cost / dearest * GRID), tail.square))
    return tails[0]


def _segments(steps: Sequence[Step], first: int, options: Options, errors: Errors, worst_edge: float) -> Iterator[_Segment]:
    lengths = [
        0,
        *(length for begin, length in errors.edges if begin == first and errors.edges[begin, length][0] <= worst_edge**2),
    ]
    guidance = (True, False) if options.skip else (True,)
    for attention, guided, length in itertools.product(options.attention[first], guidance, lengths):
        yield _Segment(first, attention, guided, length)


def _worth(segment: _Segment, steps: Sequence[Step], errors: Errors, price: Price) -> tuple[float, float]:
    """Cost and squared error of a segment. The steps that take over from an unguided one have no guidance either."""
    step = replace(steps[segment.first], attention=segment.attention, guided=segment.guided)
    cost, square = price(step), errors.attention[segment.first, segment.attention]
    covered = range(segment.first, segment.first + segment.length + 1)
    if segment.length:
        square += errors.edges[segment.first, segment.length][0]
        cost += sum(price(replace(step, index=index, source=segment.first)) for index in covered[1:])
    if not segment.guided:
        square += sum(errors.unguided[index] for index in covered)
    return cost, square


def _unbeaten(found: list[T], key: Callable[[T], tuple[float, float]]) -> list[T]:
    kept: list[T] = []
    lowest = float("inf")
    for one in sorted(found, key=key):
        if key(one)[1] < lowest:
            kept.append(one)
            lowest = key(one)[1]
    return kept


def _schedule(tail: _Tail, plan: Sequence[Step], formats: tuple[GemmName, GemmName], errors: Errors) -> Schedule:
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
            factors += [errors.edges[segment.first, segment.length][1]] * segment.length
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
