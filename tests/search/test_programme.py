"""The dynamic programme against trying every schedule, and the sum of errors against a schedule taken apart by hand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from wan_mlperf.errors import BadInput
from wan_mlperf.recipe import Recipe
from wan_mlperf.search import choices, programme
from wan_mlperf.search.choices import Errors, Options, Schedule
from wan_mlperf.step_plan import Step, make_plan
from wan_mlperf.workload import Workload

STEPS = 5  # two of the high-noise expert
WORKLOAD = Workload(height=64, width=64, frames=17, fps=8, steps=STEPS)
RECIPE = Recipe(name="test", workload=WORKLOAD)
PLAN = make_plan(RECIPE, WORKLOAD)
OPTIONS = Options(
    attention=(("sdpa", "sage_fp4"),) * STEPS, formats=(("bf16", "bf16"), ("bf16", "mxfp4"), ("mxfp4", "mxfp4")), skip=True
)


def price(step: Step) -> float:
    """Seconds that differ by every choice."""
    each = (1.0 if step.attention == "sdpa" else 0.7) * (1.0 if step.gemm == "bf16" else 0.8)
    return step.forwards * each + 0.01


@pytest.fixture(scope="module")
def errors() -> Errors:
    numbers = random.Random(7)
    trials = choices.trials(PLAN, OPTIONS)
    return Errors.from_trials(PLAN, OPTIONS, {name: numbers.uniform(1e-4, 1e-2) for name in trials})


def every_schedule(errors: Errors) -> list[Schedule]:
    """All of them, made without the programme: which steps reuse, which are guided, which kernel each has."""
    found = []
    for reused in itertools.chain.from_iterable(itertools.combinations(range(STEPS), n) for n in range(STEPS)):
        sources = source_of(reused)
        if sources is None:
            continue
        computed = [index for index in range(STEPS) if index not in reused]
        for guided in itertools.product((True, False), repeat=len(computed)):
            off = {index for index, yes in zip(computed, guided, strict=True) if not yes}
            off |= {index for index, source in sources.items() if source in off}
            for kernels in itertools.product(("sdpa", "sage_fp4"), repeat=len(computed)):
                own = dict(zip(computed, kernels, strict=True))
                attention = tuple(own[sources.get(index, index)] for index in range(STEPS))
                for high, low in OPTIONS.formats:
                    found.append(
                        Schedule(
                            attention=attention,  # type: ignore[arg-type]
                            high_noise=high,
                            low_noise=low,
                            off=tuple(sorted(off)),
                            reuse=reused,
                            factors=(1.0,) * len(reused),
                        )
                    )
    return found


def source_of(reused: Sequence[int]) -> dict[int, int] | None:
    """Each reused step's source; None where there is none, or it is further than the longest edge."""
    sources: dict[int, int] = {}
    for index in reused:
        source = index - 1
        while source in reused:
            source -= 1
        if source < 0 or index - source > choices.LONGEST or PLAN[source].expert != PLAN[index].expert:
            return None
        sources[index] = source
    return sources


def cost(schedule: Schedule) -> float:
    gemm = dict(zip(choices.EXPERTS, schedule.formats(), strict=True))
    steps = [
        replace(
            step,
            attention=schedule.attention[step.index],
            gemm=gemm[step.expert],
            guided=step.index not in schedule.off,
            source=0 if step.index in schedule.reuse else None,
        )
        for step in PLAN
    ]
    return sum(price(step) for step in steps)


def test_it_finds_what_trying_every_schedule_finds(errors: Errors) -> None:
    points = programme.front(PLAN, OPTIONS, errors, price, worst_edge=1.0)
    every = [(cost(one), errors.square(one, PLAN)) for one in every_schedule(errors)]
    assert len(every) > 2000
    assert all(a.cost < b.cost and a.square > b.square for a, b in itertools.pairwise(points))
    for budget in (2.0, 3.5, 5.0, 7.0, 10.1):
        best = programme.choose(points, cost=budget)
        assert best.cost <= budget
        assert best.square == pytest.approx(min(square for spent, square in every if spent <= budget + 1e-9), rel=1e-3)
    for limit in (0.08, 0.15):
        cheapest = programme.choose(points, error=limit)
        assert cheapest.error <= limit
        assert cheapest.cost == pytest.approx(min(spent for spent, square in every if square <= limit**2), rel=1e-3)


def test_a_point_is_what_its_schedule_costs(errors: Errors) -> None:
    for point in programme.front(PLAN, OPTIONS, errors, price, worst_edge=1.0):
        assert point.cost == pytest.approx(cost(point.schedule))
        assert point.square == pytest.approx(errors.square(point.schedule, PLAN))


def test_an_edge_that_is_too_bad_is_never_taken(errors: Errors) -> None:
    limit = sorted(square**0.5 for square, _ in errors.edges.values())[len(errors.edges) // 2]
    for point in programme.front(PLAN, OPTIONS, errors, price, worst_edge=limit):
        plan = make_plan(point.schedule.in_recipe(RECIPE), WORKLOAD)
        for step in plan:
            length = sum(other.source == step.index for other in plan)
            assert not length or errors.edges[step.index, length][0] ** 0.5 <= limit


def test_the_closed_division_skips_nothing() -> None:
    options = Options(attention=OPTIONS.attention, formats=OPTIONS.formats, skip=False)
    trials = choices.trials(PLAN, options)
    assert len(trials) == STEPS + 2  # FP4 attention in each step, MXFP4 in each expert
    errors = Errors.from_trials(PLAN, options, dict.fromkeys(trials, 1e-3))
    for point in programme.front(PLAN, options, errors, price, worst_edge=1.0):
        assert point.schedule.off == () and point.schedule.reuse == ()


def test_a_goal_out_of_reach_is_refused(errors: Errors) -> None:
    points = programme.front(PLAN, OPTIONS, errors, price, worst_edge=1.0)
    with pytest.raises(BadInput, match="no schedule is that cheap"):
        programme.choose(points, cost=0.1)
    exact = programme.choose(points, error=1e-9)
    assert exact.error == 0.0, "the exact schedule is always one of them"


def test_the_best_factor_is_the_lowest_point_of_the_parabola() -> None:
    squares = [(factor - 1.03) ** 2 + 0.002 for factor in choices.FACTORS]
    options = Options(attention=(("sdpa",),) * STEPS, formats=(("bf16", "bf16"),), skip=True)
    trials = dict.fromkeys(choices.trials(PLAN, options), 0.0)
    for factor, square in zip(choices.FACTORS, squares, strict=True):
        trials[f"0+1 x{factor:g}"] = square
    assert Errors.from_trials(PLAN, options, trials).edges[0, 1] == pytest.approx((0.002, 1.03))
