"""`gemm.keep`: layers in another format, of one expert, in some steps; a format that changes over the steps."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from wan_mlperf import Pipeline, load_recipe
from wan_mlperf.denoise import Start
from wan_mlperf.errors import BadInput
from wan_mlperf.kernels.linear import ByStep, Fp8Linear, Mxfp4Linear
from wan_mlperf.kernels.packed import PackedLinear
from wan_mlperf.predict import forecast, hardware, work
from wan_mlperf.predict.from_recipe import prices_of
from wan_mlperf.predict.subject import expert_bytes
from wan_mlperf.preflight import prepare
from wan_mlperf.recipe import Recipe
from wan_mlperf.step_plan import Step, as_table, make_plan
from wan_mlperf.workload import MLPERF

STEPS, BOUNDARY, CHANGE = 8, 3, 5  # three steps of the high-noise expert; the format changes within the low-noise one
MXFP4 = ["gemm.high_noise=mxfp4", "gemm.low_noise=mxfp4"]
LATE = f"gemm.keep=[{{layers: blocks.1.*, format: fp8, steps: [{CHANGE}, {STEPS - 1}]}}]"
QUERY = ["a red circle moving left"]


def recipe(model: Path, *more: str) -> Recipe:
    sizes = ["workload.height=32", "workload.width=32", "workload.frames=5", f"workload.steps={STEPS}"]
    plain = ["attention.early=sdpa", "attention.late=sdpa", "model.dtype=float32", "mesh.ranks=1"]
    return load_recipe("tiny", overrides=[f"model.checkpoint={model}", *sizes, *plain, *more])


def kinds(pipeline: Pipeline, expert: str) -> dict[str, type[nn.Module]]:
    modules = pipeline.experts[expert].transformer.named_modules()
    linear = (PackedLinear, Fp8Linear, Mxfp4Linear, ByStep)
    return {name: type(one) for name, one in modules if name.startswith("blocks.") and isinstance(one, linear)}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_format_that_changes_is_one_model_and_then_the_other(model: Path, compiled: bool) -> None:
    """Bit for bit: MXFP4's latents up to the change, from which a model whose layers are FP8 throughout goes on."""
    early = Pipeline.load(recipe(model, *MXFP4))
    begin = early.start(QUERY)
    changes: list[Start] = []

    def keep(step: Step, latents: torch.Tensor) -> None:
        if step.index == CHANGE - 1:
            changes.append(Start(CHANGE, latents, copy.deepcopy(begin.scheduler)))

    never = early.latents(QUERY, start=begin, on_step=keep)
    late = Pipeline.load(recipe(model, *MXFP4, "gemm.keep=[[blocks.1.*, fp8]]"))
    spliced = late.latents(QUERY, start=changes[0])
    both = Pipeline.load(recipe(model, *MXFP4, LATE, *(["compile.experts=true"] if compiled else [])))
    made = both.latents(QUERY)
    assert float((made - never).norm() / never.norm()) > 1e-4, "the change must make a difference"
    if compiled:
        assert float((made - spliced).norm() / spliced.norm()) < 1e-5
    else:
        assert torch.equal(made, spliced)
        assert torch.equal(both.latents(QUERY), made), "a second query starts with the first step's formats again"


def test_both_formats_are_held_only_where_they_are_needed(model: Path) -> None:
    pipeline = Pipeline.load(recipe(model, *MXFP4, LATE))
    assert ByStep not in kinds(pipeline, "high_noise").values(), "none of its steps is among them"
    low = kinds(pipeline, "low_noise")
    held = {name for name, kind in low.items() if kind is ByStep}
    assert held and {name.split(".")[1] for name in held} == {"1"} and f"{len(held)} mxfp4 and fp8" in pipeline.load_summary[1]
    assert {low[f"{name}.formats.{form}"] for name in held for form in ("mxfp4", "fp8")} == {Mxfp4Linear, Fp8Linear}


def test_a_rule_of_one_expert_leaves_the_other_as_it_is(model: Path) -> None:
    rule = "gemm.keep=[{layers: blocks.0.ffn.*, format: bf16, expert: high_noise}]"
    pipeline = Pipeline.load(recipe(model, *MXFP4, rule))
    high, low = kinds(pipeline, "high_noise"), kinds(pipeline, "low_noise")
    assert {name for name, kind in high.items() if kind is PackedLinear} == {"blocks.0.ffn.net.0", "blocks.0.ffn.net.2"}
    assert set(low.values()) == {Mxfp4Linear}


def test_the_plan_prints_them(model: Path) -> None:
    plan = prepare(recipe(model, *MXFP4, LATE)).plan
    assert [step.layers for step in plan] == [()] * CHANGE + [(("blocks.1.*", "fp8"),)] * (STEPS - CHANGE)
    cells = list(as_table(plan).columns[6].cells)
    assert cells == ["mxfp4"] * CHANGE + ["mxfp4; blocks.1.*: fp8"] * (STEPS - CHANGE)


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ("[{layers: '*', format: fp8, steps: [2, 8]}]", "gemm.keep.steps: 8 is not a step; allowed: 0 to 7"),
        ("[{layers: '*', format: fp8, steps: [3, 2]}]", "steps ends before it starts"),
        ("[{layers: '*', format: fp8, steps: [3]}]", "gemm.keep"),
        ("[{layers: '*', format: fp9}]", "gemm.keep"),
        ("[{layers: '*', format: fp8, expert: middle}]", "gemm.keep"),
        ("[{layers: '*'}]", "gemm.keep"),
        ("[{layers: '*', format: fp8, when: late}]", "gemm.keep"),
        ("[[blocks.0.*]]", "gemm.keep"),
    ],
)
def test_a_rule_that_makes_no_sense_is_one_line(model: Path, keep: str, says: str) -> None:
    with pytest.raises(BadInput) as caught:
        prepare(recipe(model, f"gemm.keep={keep}"))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_predict_prices_and_holds_both() -> None:
    """On the published model: a quarter of the blocks in FP8 in the last steps costs seconds there, and memory in one expert."""
    gpu, rule = hardware.find("mi355x"), "gemm.keep=[{layers: 'blocks.3?.*', format: fp8, steps: [16, 19]}]"
    plain, kept = (load_recipe("mi355x-singlestream", overrides=more) for more in ([], [rule]))
    shares = work.gemm_shares("mxfp4", (("blocks.3?.*", "fp8"),))
    assert shares == pytest.approx({"mxfp4": 0.75, "fp8": 0.25})
    assert work.gemm_shares("mxfp4", (("*.ffn.*", "bf16"),))["bf16"] == pytest.approx(2 * 13824 / (2 * 13824 + 6 * 5120))
    prices = prices_of(kept, gpu, gpus=8)
    steps = make_plan(kept, MLPERF)
    early, late = prices.step(steps[0]), prices.step(steps[-1])
    fp8 = prices.forward(attention="sage_fp8", gemm="fp8").gemm * 2 / prices.shape.cfg
    assert late.gemm == pytest.approx(0.75 * early.gemm + 0.25 * fp8)
    assert {"gemm fp8", "gemm mxfp4"} <= set(prices.plan(steps).kernels)
    before, after = (forecast.subject_of(one, gpu, gpus=8) for one in (plain, kept))
    assert expert_bytes(after, "high_noise", "mxfp4") == expert_bytes(before, "high_noise", "mxfp4")
    numbers = 10 * (8 * 5120**2 + 2 * 5120 * 13824)  # of ten blocks, in FP8 beside MXFP4, with a scale per row
    more = expert_bytes(after, "low_noise", "mxfp4") - expert_bytes(before, "low_noise", "mxfp4")
    assert more == pytest.approx(numbers, rel=0.001)
