"""A recipe's approximations one at a time, and a recipe's numerics on a model that can run here. For `bench fidelity`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from wan_mlperf.kernels import gemm
from wan_mlperf.recipe import Guidance, Recipe, Reuse, make_exact

NOTHING = "dtype and order of rounding"
SCHEDULE = "schedule: attention and linear layers"
ALL = "all"


def on(recipe: Recipe, other: Recipe) -> Recipe:
    """The recipe's schedule and numerics on another recipe's model, size and mesh."""
    return replace(
        other,
        name=f"{recipe.name} on {other.name}",
        model=replace(other.model, dtype=recipe.model.dtype, vae_dtype=recipe.model.vae_dtype),
        attention=recipe.attention,
        guidance=recipe.guidance,
        reuse=recipe.reuse,
        gemm=recipe.gemm,
        exchange=recipe.exchange,
        trim_text=recipe.trim_text,
        vae=recipe.vae,
        references=other.references if recipe.references == "forbid" else recipe.references,
    )


def parts_of(recipe: Recipe) -> dict[str, Recipe]:
    """Name -> the recipe with one approximation alone: first none of them, last all. Those that it does not make are left out."""
    exact = make_exact(recipe)
    plain = replace(exact, exact=False, model=replace(exact.model, dtype=recipe.model.dtype))
    schedule = {"attention": recipe.attention, "gemm": recipe.gemm}
    skipping = {"guidance": recipe.guidance, "reuse": recipe.reuse}
    quantised = set(gemm.names(recipe.gemm)) != {"bf16"}
    attended = recipe.attention.steps is not None or (recipe.attention.early, recipe.attention.late) != ("sdpa", "sdpa")
    attended |= recipe.attention.cross != plain.attention.cross
    found = {NOTHING: plain}
    if attended:
        found["attention"] = replace(plain, attention=recipe.attention)
    if quantised:
        found["linear layers"] = replace(plain, gemm=recipe.gemm)
    if attended and quantised:
        found[SCHEDULE] = replace(plain, **schedule)  # type: ignore[arg-type]
    if recipe.exchange != "bf16":
        found[f"exchange {recipe.exchange}"] = replace(plain, exchange=recipe.exchange)
    if recipe.model.vae_dtype != "checkpoint":
        vae = f"VAE {recipe.model.vae_dtype}"
        found[vae] = replace(plain, model=replace(plain.model, vae_dtype=recipe.model.vae_dtype))
    if (recipe.guidance, recipe.reuse) != (Guidance(), Reuse()):
        found["skipped work"] = replace(plain, **skipping)  # type: ignore[arg-type]
    return {**found, ALL: recipe}


def expected(errors: Mapping[str, float]) -> float:
    """Estimate the error of all approximations from that of each alone (`parts_of`): independent errors add by their squares."""
    own = errors[NOTHING] ** 2
    alone = [error for name, error in errors.items() if name not in (NOTHING, SCHEDULE, ALL)]
    return float((own + sum(max(0.0, error**2 - own) for error in alone)) ** 0.5)
