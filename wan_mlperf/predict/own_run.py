"""The prediction for one of our runs on known hardware, stage by stage: for result.json, the report and `predict fit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wan_mlperf.errors import BadInput
from wan_mlperf.parallel.mesh import Shape
from wan_mlperf.predict import hardware, rates, work
from wan_mlperf.predict.from_recipe import ways_on
from wan_mlperf.predict.hardware import Hardware
from wan_mlperf.predict.predicted import Predicted
from wan_mlperf.predict.prices import Prices, Seconds
from wan_mlperf.recipe import Recipe
from wan_mlperf.step_plan import Step
from wan_mlperf.workload import Workload


def gpu_of(device: str) -> Hardware | None:
    """The GPU that a result's `device` names ("gfx950: AMD Instinct MI355X"), None for unknown hardware."""
    return hardware.of_device(device.partition(": ")[2] or device)


def prices_of_run(
    recipe: Recipe, workload: Workload, *, gpu: Hardware, shape: Shape, kernels: Mapping[str, str], config: Mapping[str, Any]
) -> Prices:
    """Return the prices of a run as it was: `kernels` from its result (recipe name -> what ran), `config` of the experts."""
    names = {name: words.removeprefix("xDiT ") for name, words in kernels.items()}
    size = work.size_of_expert(dict(config))
    return Prices(gpu=gpu, shape=shape, workload=workload, size=size, ways=ways_on(recipe, shape, gpu), kernels=names)


def expect(
    recipe: Recipe,
    workload: Workload,
    plan: Sequence[Step],
    *,
    device: str,
    shape: Shape,
    kernels: Mapping[str, str],
    config: Mapping[str, Any],
) -> Predicted | None:
    """Return what the model expects of a run with this plan, None for unknown hardware, such as a CPU."""
    gpu = gpu_of(device)
    if gpu is None:
        return None
    prices = prices_of_run(recipe, workload, gpu=gpu, shape=shape, kernels=kernels, config=config)
    try:
        for step in plan:
            rates.attention(prices.kernel(step.attention), gpu)
        whole, stages = prices.plan(plan), stages_of(prices, plan)
    except BadInput as error:
        return Predicted(hardware=gpu.name, unknown=str(error))
    return Predicted(hardware=gpu.name, seconds=whole.seconds, band=whole.band, stages=stages)


def stages_of(prices: Prices, plan: Sequence[Step]) -> dict[str, float]:
    """Predicted seconds of the stages that a run times."""

    def denoising(expert: str) -> float:
        return sum((prices.step(step) for step in plan if step.expert == expert), Seconds()).total

    return {
        "text_encode": prices.text_encode().total,
        "denoise_high": denoising("high_noise"),
        "denoise_low": denoising("low_noise"),
        "vae_decode": prices.decode().total,
    }
