"""The recipes that searches found: faster by as much as they promise, here and as predicted for eight MI355X."""

from __future__ import annotations

import statistics
import time

import pytest

from wan_mlperf import Pipeline, load_recipe
from wan_mlperf.division import division_of
from wan_mlperf.predict.from_recipe import prices_of
from wan_mlperf.step_plan import make_plan
from wan_mlperf.workload import MLPERF


@pytest.mark.slow
def test_tiny_fast_takes_at_most_two_thirds_of_tiny() -> None:
    """CPU time of the denoising, which other programs on the machine do not change, of five videos each in turns."""
    pipelines = {name: Pipeline.load(load_recipe(name, overrides=["mesh.ranks=1"])) for name in ("tiny", "tiny-fast")}
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    for number in range(6):
        for name, pipeline in pipelines.items():
            start = time.process_time()
            pipeline.latents(["a red circle moving left"])
            if number:  # the first one makes tables
                seconds[name].append(time.process_time() - start)
    ratio = statistics.median(seconds["tiny-fast"]) / statistics.median(seconds["tiny"])
    print(f"tiny-fast takes {ratio:.2f} of tiny's CPU time")
    assert ratio <= 0.65


@pytest.mark.parametrize(
    ("name", "kind", "limit"), [("mi355x-singlestream", "closed", 14.0), ("mi355x-singlestream-open", "open", 9.0)]
)
def test_eight_mi355x_are_predicted_within_the_goal(name: str, kind: str, limit: float) -> None:
    recipe = load_recipe(name, overrides=["model.fixed_latent=fixed_latent.pt"])  # as the closed division asks
    plan = make_plan(recipe, MLPERF)
    prediction = prices_of(recipe, "mi355x", gpus=8).plan(plan)
    assert division_of(recipe, plan).name == kind
    assert prediction.band[0] < prediction.seconds < prediction.band[1] and prediction.seconds <= limit
