"""Steps without guidance and steps that apply an earlier change again: against diffusers' own transformer, on every mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipeline import make_latents
from tests.ranks import run_ranks
from wan_mlperf import Pipeline, load_recipe
from wan_mlperf.errors import BadInput
from wan_mlperf.pipeline import Query
from wan_mlperf.preflight import prepare
from wan_mlperf.recipe import Recipe
from wan_mlperf.workload import NEGATIVE_PROMPT

PROMPT, SEED, STEPS, BOUNDARY = "a red circle moving left", 7, 8, 3  # three steps of the high-noise expert
PLAIN = ["attention.early=sdpa", "attention.late=sdpa", "gemm.high_noise=bf16", "gemm.low_noise=bf16", "model.dtype=float32"]
# 48 x 80 pixels: 45 tokens, which neither 2 nor 4 ranks divide.
SIZES = ["workload.height=48", "workload.width=80", "workload.frames=9", f"workload.steps={STEPS}", "trim_text=false"]
PLANS: dict[str, list[str]] = {
    "plain": [],
    "off": ["guidance.off=[4,5,7]"],
    "reuse": ["reuse.steps=[1,4,6]", "reuse.factors=[1.0,0.9,1.1]"],
    # Step 4 takes the positive branch of a guided step, step 6 the change of one that was not guided.
    "both": ["reuse.steps=[4,6]", "guidance.off=[4,5,6,7]"],
}
TOLERANCE = 1e-5


def overrides(model: Path, name: str) -> list[str]:
    return [f"model.checkpoint={model}", *SIZES, *PLAIN, *PLANS[name]]


def recipe(model: Path, name: str, *more: str) -> Recipe:
    return load_recipe("tiny", overrides=[*overrides(model, name), *more])


def query(prompt: str, seed: int = SEED) -> Query:
    return Query(prompt=prompt, seed=seed)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def one_rank(model: Path) -> dict[str, torch.Tensor]:
    return {name: Pipeline.load(recipe(model, name)).latents([query(PROMPT)]) for name in PLANS}


@contextmanager
def replaced_blocks(transformer: Any, change: torch.Tensor | None, seen: dict[str, torch.Tensor]) -> Iterator[None]:
    """See what diffusers' blocks get and give; with a `change`, have it added in their place."""
    blocks = transformer.blocks
    hooks = [
        blocks[0].register_forward_pre_hook(lambda _block, inputs: seen.update(before=inputs[0])),
        blocks[-1].register_forward_hook(lambda _block, _inputs, out: seen.update(after=out)),
    ]
    if change is not None:
        for block in blocks:
            block.forward = lambda hidden, *_: hidden
        blocks[-1].forward = lambda hidden, *_: hidden + change
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for block in blocks:
            block.__dict__.pop("forward", None)


@torch.inference_mode()
def by_diffusers(model: Path, *, off: set[int], reuse: dict[int, float]) -> torch.Tensor:
    """The same two rules written around diffusers' own transformers, scheduler and prompt encoding."""
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(model)
    positive, negative = pipeline.encode_prompt(PROMPT, NEGATIVE_PROMPT, max_sequence_length=512)
    latents = torch.randn((1, 16, 3, 6, 10), generator=torch.Generator().manual_seed(SEED))
    pipeline.scheduler.set_timesteps(STEPS)
    changes: list[torch.Tensor] = []
    for index, timestep in enumerate(pipeline.scheduler.timesteps):
        transformer, scale = (pipeline.transformer, 4.0) if timestep >= 875 else (pipeline.transformer_2, 3.0)
        texts = [positive] if index in off else [positive, negative]
        made, new = [], []
        for branch, text in enumerate(texts):
            change = reuse[index] * changes[branch] if index in reuse else None
            seen: dict[str, torch.Tensor] = {}
            with replaced_blocks(transformer, change, seen):
                made.append(transformer(latents, timestep.expand(1), text, return_dict=False)[0])
            new.append(seen["after"] - seen["before"])
        if index not in reuse:
            changes = new
        noise = made[0] if index in off else made[1] + scale * (made[0] - made[1])
        latents = pipeline.scheduler.step(noise, timestep, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize(
    ("name", "off", "reuse"),
    [("off", {4, 5, 7}, {}), ("reuse", set(), {1: 1.0, 4: 0.9, 6: 1.1}), ("both", {4, 5, 6, 7}, {4: 1.0, 6: 1.0})],
)
def test_it_is_what_diffusers_transformer_gives(
    name: str, off: set[int], reuse: dict[int, float], model: Path, one_rank: dict[str, torch.Tensor]
) -> None:
    assert error(one_rank[name], by_diffusers(model, off=off, reuse=reuse)) < TOLERANCE
    assert error(one_rank[name], one_rank["plain"]) > 1e-3, "the plan must make a difference"


@pytest.mark.job
@pytest.mark.parametrize(
    ("ranks", "mesh"),
    [
        (2, ["mesh.cfg=2"]),
        pytest.param(2, ["mesh.cfg=1"], marks=pytest.mark.slow),
        pytest.param(4, ["mesh.cfg=2"], marks=pytest.mark.slow),
        pytest.param(4, ["mesh.cfg=1"], marks=pytest.mark.slow),
    ],
)
def test_every_mesh_gives_the_same(
    ranks: int, mesh: list[str], model: Path, tmp_path: Path, one_rank: dict[str, torch.Tensor]
) -> None:
    """Also two videos at once, and a query after others."""
    settings = {name: [*overrides(model, name), *mesh] for name in PLANS}
    cases: dict[str, Any] = {name: (settings[name], False, PROMPT, SEED) for name in PLANS}
    # The last of them is "both", whose pipeline has the next two queries as well.
    cases |= {"two": (settings["both"], False, [PROMPT, "a blue square"], SEED), "again": cases["both"]}
    run_ranks(make_latents.main, tmp_path, cases, ranks=ranks)
    made = {name: torch.load(tmp_path / f"{name}.pt", weights_only=True)["latents"] for name in cases}
    for name in PLANS:
        assert error(made[name], one_rank[name]) < TOLERANCE, name
    assert error(made["two"][:1], one_rank["both"]) < TOLERANCE and len(made["two"]) == 2
    assert torch.equal(made["again"], made["both"]), "a query is not touched by those before it"


def test_a_query_leaves_nothing_behind(model: Path, one_rank: dict[str, torch.Tensor]) -> None:
    pipeline = Pipeline.load(recipe(model, "both"))
    pipeline.latents([query("another prompt", seed=1)])
    assert torch.equal(pipeline.latents([query(PROMPT)]), one_rank["both"])


def test_a_batch_is_its_single_videos(model: Path, one_rank: dict[str, torch.Tensor]) -> None:
    both = Pipeline.load(recipe(model, "both")).latents([query(PROMPT), query("a blue square")])
    assert error(both[:1], one_rank["both"]) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "mesh"), [(1, "mesh.cfg=1"), (2, "mesh.cfg=2"), (2, "mesh.cfg=1"), (4, "mesh.cfg=2")])
def test_compiled_gives_the_same(ranks: int, mesh: str, model: Path, tmp_path: Path, one_rank: dict[str, torch.Tensor]) -> None:
    cases = {"both": ([*overrides(model, "both"), "compile.experts=true", mesh], False, PROMPT, SEED)}
    run_ranks(make_latents.main, tmp_path, cases, ranks=ranks, timeout=500)
    assert error(torch.load(tmp_path / "both.pt", weights_only=True)["latents"], one_rank["both"]) < TOLERANCE


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (["reuse.steps=[0]"], "reuse.steps: 0 is the first step"),
        ([f"reuse.steps=[{BOUNDARY}]"], "is the first of the low-noise expert"),
        (["reuse.steps=[8]"], "reuse.steps: 8 is not a step; allowed: 0 to 7"),
        (["guidance.off=[9]"], "guidance.off: 9 is not a step"),
        (["reuse.steps=[5]", "guidance.off=[4]"], "step 5 is guided, but step 4, whose change it would apply, has no negative"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(setting: list[str], says: str, model: Path) -> None:
    with pytest.raises(BadInput, match=says.replace(".", r"\.")):
        prepare(recipe(model, "plain", *setting))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("reuse.steps=[3,2]", "steps are not in order"),
        ("reuse.factors=[0.5]", "factors has 1 entries; allowed: one per step of reuse.steps, 0"),
        ("guidance.interval=[0.9,0.1]", "interval ends below its start"),
        ("guidance.interval=[0.9,1.1]", "guidance.interval"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(setting: str, says: str, model: Path) -> None:
    with pytest.raises(BadInput, match=says.replace(".", r"\.")):
        recipe(model, "plain", setting)


def test_heads_that_both_branches_ranks_cannot_share_are_refused(model: Path) -> None:
    """8 heads on CFG 2 x Ulysses 8: a step without guidance would need Ulysses 16."""
    prepare(recipe(model, "plain", "mesh.cfg=2", "workload.width=160"), world=16)
    with pytest.raises(BadInput, match="Ulysses 16, by which 8 heads are not divisible"):
        prepare(recipe(model, "off", "mesh.cfg=2", "workload.width=160"), world=16)


def test_the_interval_is_of_noise_levels(model: Path) -> None:
    plan = prepare(recipe(model, "plain", "guidance.interval=[0.5,0.95]")).plan
    assert [step.guided for step in plan] == [0.5 <= step.sigma <= 0.95 for step in plan]
    assert 0 < sum(step.guided for step in plan) < len(plan)
    assert sum(step.forwards for step in plan) == len(plan) + sum(step.guided for step in plan)
