"""The plan against diffusers' scheduler and the recipe's schedule."""

from __future__ import annotations

import dataclasses

import pytest
from diffusers import UniPCMultistepScheduler

from wan_mlperf.errors import BadInput
from wan_mlperf.recipe import Attention, AttentionName, Gemm, Recipe, make_exact
from wan_mlperf.step_plan import WAN22_SCHEDULER, make_plan
from wan_mlperf.workload import MLPERF

RECIPE = Recipe(
    name="test",
    attention=Attention(early="sage_fp4", late="sage_fp8", early_fraction=0.85),
    gemm=Gemm(high_noise="mxfp4", low_noise="fp8"),
)


def test_timesteps_and_sigmas_are_the_schedulers() -> None:
    scheduler = UniPCMultistepScheduler(**WAN22_SCHEDULER)
    scheduler.set_timesteps(20)
    plan = make_plan(RECIPE, MLPERF)
    assert [step.timestep for step in plan] == scheduler.timesteps.tolist()
    assert [step.sigma for step in plan] == pytest.approx(scheduler.sigmas.tolist()[:20])
    assert plan[0].sigma == pytest.approx(1.0, abs=1e-3)


def test_expert_guidance_and_gemm_change_at_the_boundary() -> None:
    for step in make_plan(RECIPE, MLPERF):
        high = step.timestep >= 875
        assert step.expert == ("high_noise" if high else "low_noise")
        assert step.guidance == (4.0 if high else 3.0)
        assert step.gemm == ("mxfp4" if high else "fp8")


def test_attention_is_early_then_late() -> None:
    attention = [step.attention for step in make_plan(RECIPE, MLPERF)]
    assert attention == ["sage_fp4"] * 17 + ["sage_fp8"] * 3


def test_an_explicit_list() -> None:
    middle: list[AttentionName] = ["sage_fp4"] * 18
    steps: tuple[AttentionName, ...] = ("sdpa", *middle, "sage_fp8")
    recipe = dataclasses.replace(RECIPE, attention=Attention(steps=steps))
    assert [step.attention for step in make_plan(recipe, MLPERF)] == list(steps)
    with pytest.raises(BadInput, match=r"attention.steps: has 20 entries; allowed: one per step, 8"):
        make_plan(recipe, dataclasses.replace(MLPERF, steps=8))


def test_exact_has_no_approximation() -> None:
    plan = make_plan(make_exact(RECIPE), MLPERF)
    assert {step.attention for step in plan} == {"sdpa"}
    assert {step.gemm for step in plan} == {"bf16"}
