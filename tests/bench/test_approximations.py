"""`bench fidelity --parts` and `--on`: which rows there are, what each turns on, and how their errors are added."""

from __future__ import annotations

import dataclasses

import pytest

from wan_mlperf.bench import approximations
from wan_mlperf.errors import BadInput
from wan_mlperf.recipe import Attention, Gemm, Recipe, load_recipe, make_exact


def on_tiny() -> Recipe:
    return approximations.on(load_recipe("mi355x-singlestream"), load_recipe("tiny"))


def test_a_recipe_on_another_ones_model() -> None:
    recipe, tiny, large = on_tiny(), load_recipe("tiny"), load_recipe("mi355x-singlestream")
    assert (recipe.model.checkpoint, recipe.workload, recipe.mesh, recipe.references) == (
        "embedded",
        tiny.workload,
        tiny.mesh,
        "allow",
    )
    for part in ("attention", "gemm", "exchange", "guidance", "reuse", "trim_text", "vae"):
        assert getattr(recipe, part) == getattr(large, part), part
    assert (recipe.model.dtype, recipe.model.vae_dtype) == ("bfloat16", "bfloat16")
    assert not recipe.compile.experts


def test_the_parts_of_the_mi355xs_recipe() -> None:
    parts = approximations.parts_of(on_tiny())
    assert list(parts) == [
        "dtype and order of rounding",
        "attention",
        "linear layers",
        "schedule: attention and linear layers",
        "exchange fp8",
        "VAE bfloat16",
        "all",
    ]
    plain = dataclasses.replace(parts["dtype and order of rounding"], name="exact", exact=True)
    assert dataclasses.replace(plain, model=make_exact(plain).model) == dataclasses.replace(make_exact(on_tiny()), name="exact")
    own = {"attention": {"attention"}, "linear layers": {"gemm"}, "exchange fp8": {"exchange"}, "VAE bfloat16": {"model"}}
    for name, changed in own.items():
        differing = {
            one.name
            for one in dataclasses.fields(Recipe)
            if getattr(parts[name], one.name) != getattr(parts["dtype and order of rounding"], one.name)
        }
        assert differing == changed, name
    assert parts["all"] == on_tiny()
    assert parts["schedule: attention and linear layers"].exchange == "bf16"


def test_what_a_recipe_does_not_do_is_no_part() -> None:
    plain = dataclasses.replace(load_recipe("tiny"), attention=Attention(), gemm=Gemm())
    plain = dataclasses.replace(plain, model=dataclasses.replace(plain.model, vae_dtype="checkpoint"))
    assert list(approximations.parts_of(plain)) == ["dtype and order of rounding", "all"]
    assert "skipped work" in approximations.parts_of(load_recipe("tiny-fast"))
    merged = approximations.parts_of(dataclasses.replace(plain, attention=Attention(cross="native")))
    assert list(merged) == ["dtype and order of rounding", "attention", "all"]


def test_independent_errors_add_by_their_squares() -> None:
    """The dtype's own error is in every row and counts once; the schedule's row is the sum of two others."""
    alone = {"dtype and order of rounding": 0.0, "attention": 0.03, "linear layers": 0.04}
    assert approximations.expected({**alone, "schedule: attention and linear layers": 9.0, "all": 9.0}) == pytest.approx(0.05)
    own = {"dtype and order of rounding": 0.01, "attention": 0.01, "linear layers": 0.01, "all": 0.01}
    assert approximations.expected(own) == pytest.approx(0.01)


def test_bad_input() -> None:
    from wan_mlperf.bench import fidelity

    with pytest.raises(BadInput, match="--exchange-ranks: 0 is not allowed; allowed: from 1"):
        fidelity.main(["--exchange-ranks", "0"])
    with pytest.raises(BadInput, match="recipe 'tyni': no such file"):
        fidelity.main(["--on", "tyni"])
    with pytest.raises(BadInput, match="exchange: 'fp4' is not allowed"):
        fidelity.main(["--set", "exchange=fp4"])
