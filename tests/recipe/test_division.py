"""Closed or open, and which choice made it so."""

from __future__ import annotations

import pytest

from wan_mlperf.division import Division, division_of
from wan_mlperf.recipe import load_recipe
from wan_mlperf.step_plan import make_plan

LATENT = "model.fixed_latent=/data/fixed_latent.pt"


def of(recipe: str, *overrides: str) -> Division:
    made = load_recipe(recipe, overrides=overrides)
    return division_of(made, make_plan(made, made.effective_workload))


@pytest.mark.parametrize("recipe", ["mi355x-singlestream", "mi355x-offline", "h100"])
def test_our_recipes_are_closed_with_the_fixed_latent(recipe: str) -> None:
    assert of(recipe, LATENT) == Division(reasons=()) and of(recipe, LATENT).name == "closed"
    drawn = of(recipe)
    assert drawn.name == "open"
    assert drawn.reasons == ("model.fixed_latent: the noise is drawn from seed 42, not MLCommons' fixed_latent.pt",)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("guidance.off=[3, 7, 8, 9]", "guidance: no negative branch in steps 3, 7 to 9"),
        ("reuse.steps=[4, 6]", "reuse.steps: 4, 6 apply an earlier step's change instead of running the expert"),
        ("model.checkpoint=embedded", "model.checkpoint: embedded is not the benchmark's model"),
    ],
)
def test_an_open_choice_is_named(override: str, says: str) -> None:
    assert of("mi355x-singlestream", LATENT, override).reasons == (says,)


@pytest.mark.parametrize(
    "override",
    [
        *("attention.early=sdpa", "attention.late=sage_fp4", "gemm.high_noise=fp8", "trim_text=false", "vae.chunk=1"),
        *("mesh.cfg=1", "exchange=bf16", "exchange=fp8"),
    ],
)
def test_numerics_and_parallelism_are_free(override: str) -> None:
    assert of("mi355x-singlestream", LATENT, override).name == "closed"


def test_the_small_workload_is_open_whatever_else_it_does() -> None:
    reasons = of("tiny").reasons
    assert reasons[0] == "workload: not the benchmark's (17 frames of 64 x 64 in 20 steps)" and len(reasons) == 3
