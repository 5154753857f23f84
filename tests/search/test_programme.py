"""The dynamic programme against trying every schedule, and the sum of errors against a schedule taken apart by hand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from wan_mlperf.errors import BadInput
from wan_mlperf.recipe import Recipe
from wan_mlperf.search import choices, measure, programme
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


def independent() -> Errors:
    """Every choice pulls the latents in a direction of its own, so that squared errors add."""
    numbers = random.Random(7)
    trials = list(choices.trials(PLAN, OPTIONS))
    directions = np.eye(len(trials))
    made = {name: numbers.uniform(0.01, 0.1) * directions[place] for place, name in enumerate(trials)}
    for first, length in choices.edges(PLAN):  # whatever the factor
        low, high = (f"{first}+{length} x{factor:g}" for factor in choices.FACTORS)
        made[high] = made[low]
    return Errors.from_trials(PLAN, OPTIONS, made)


def entangled() -> Errors:
    """Directions at random in a space of few, so that choices add up or cancel."""
    numbers = np.random.default_rng(3)
    made = {name: numbers.uniform(0.01, 0.1) * numbers.normal(size=6) / 6**0.5 for name in choices.trials(PLAN, OPTIONS)}
    return Errors.from_trials(PLAN, OPTIONS, made)


@pytest.fixture(scope="module")
def errors() -> Errors:
    return independent()


def square(errors: Errors, schedule: Schedule) -> float:
    return errors.square(errors.of(schedule, PLAN))


def every_schedule() -> list[Schedule]:
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
    every = [(cost(one), square(errors, one)) for one in every_schedule()]
    assert len(every) > 2000
    assert all(a.cost < b.cost and a.square > b.square for a, b in itertools.pairwise(points))
    for budget in (2.0, 3.5, 5.0, 7.0, 10.1):
        best = programme.choose(points, cost=budget)
        assert best.cost <= budget
        assert best.square == pytest.approx(min(error for spent, error in every if spent <= budget + 1e-9), rel=1e-3)
    for limit in (0.08, 0.15):
        cheapest = programme.choose(points, error=limit)
        assert cheapest.error <= limit
        assert cheapest.cost == pytest.approx(min(spent for spent, error in every if error <= limit**2), rel=1e-3)


def test_a_point_is_what_its_schedule_costs(errors: Errors) -> None:
    for point in programme.front(PLAN, OPTIONS, errors, price, worst_edge=1.0):
        assert point.cost == pytest.approx(cost(point.schedule))
        assert point.square == pytest.approx(square(errors, point.schedule))


def test_an_edge_that_is_too_bad_is_never_taken(errors: Errors) -> None:
    alone = {choice[1:]: weight**0.5 for choice, weight in errors.weights().items() if choice[0] == "edge"}
    limit = sorted(alone.values())[len(alone) // 2]
    for point in programme.front(PLAN, OPTIONS, errors, price, worst_edge=limit):
        plan = make_plan(point.schedule.in_recipe(RECIPE), WORKLOAD)
        for step in plan:
            length = sum(other.source == step.index for other in plan)
            assert not length or alone[step.index, length] <= limit


def test_the_closed_division_skips_nothing() -> None:
    options = Options(attention=OPTIONS.attention, formats=OPTIONS.formats, skip=False)
    trials = choices.trials(PLAN, options)
    assert len(trials) == STEPS + 2  # FP4 attention in each step, MXFP4 in each expert
    errors = Errors.from_trials(PLAN, options, dict.fromkeys(trials, np.array([0.03])))
    for point in programme.front(PLAN, options, errors, price, worst_edge=1.0):
        assert point.schedule.off == () and point.schedule.reuse == ()


def test_a_goal_out_of_reach_is_refused(errors: Errors) -> None:
    points = programme.front(PLAN, OPTIONS, errors, price, worst_edge=1.0)
    with pytest.raises(BadInput, match="no schedule is that cheap"):
        programme.choose(points, cost=0.1)
    exact = programme.choose(points, error=1e-9)
    assert exact.error == 0.0, "the exact schedule is always one of them"


def test_choices_that_add_up_are_seen() -> None:
    """Where errors do not add, the schedules found are near the best of all, and better than by each choice's own error."""
    errors = entangled()
    every = [(cost(one), square(errors, one)) for one in every_schedule()]
    points = programme.front(PLAN, OPTIONS, errors, price, worst_edge=1.0)
    problem = programme._Problem(PLAN, OPTIONS, errors, price, 1.0)
    naive = programme._unbeaten(problem.solve(OPTIONS.formats, errors.weights()), programme._by_cost)
    budgets = (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    best = [min(error for spent, error in every if spent <= budget + 1e-9) ** 0.5 for budget in budgets]
    found = [programme.choose(points, cost=budget).error for budget in budgets]
    first = [programme.choose(naive, cost=budget).error for budget in budgets]
    assert all(one <= other for one, other in zip(found, first, strict=True))
    assert sum(found) < sum(first)
    assert sum(found) <= 1.15 * sum(best)


def test_the_best_factor_is_where_the_latents_are_nearest() -> None:
    options = Options(attention=(("sdpa",),) * STEPS, formats=(("bf16", "bf16"),), skip=True)
    made = dict.fromkeys(choices.trials(PLAN, options), np.array([0.0, 0.0]))
    for factor in choices.FACTORS:
        made[f"0+1 x{factor:g}"] = np.array([factor - 1.03, 0.002])
    errors = Errors.from_trials(PLAN, options, made)
    assert errors.factors[0, 1] == pytest.approx(1.03)
    assert errors.square([("edge", 0, 1)]) == pytest.approx(0.002**2)


def test_a_long_difference_is_folded_and_keeps_its_length() -> None:
    numbers = torch.Generator().manual_seed(1)
    exact = torch.randn(2, 16, 5, 40, 40, generator=numbers)
    one = exact + 0.1 * torch.randn(exact.shape, generator=numbers)
    other = exact + 0.1 * torch.randn(exact.shape, generator=numbers)
    vectors = [measure.difference(made, exact) for made in (one, other)]
    assert vectors[0].shape == (2 * measure.SKETCH,)
    for vector in vectors:
        assert float(vector @ vector) == pytest.approx(0.01, rel=0.05)
    assert abs(float(vectors[0] @ vectors[1])) < 0.001
