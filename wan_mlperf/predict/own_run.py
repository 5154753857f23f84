"""A run of ours on known hardware beside its prediction, stage by stage: for result.json, the report and `fit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wan_mlperf.errors import BadInput
from wan_mlperf.parallel.mesh import Shape
from wan_mlperf.predict import hardware
from wan_mlperf.predict.from_recipe import ways_of
from wan_mlperf.predict.prices import Prices, Seconds
from wan_mlperf.predict.work import ExpertSize
from wan_mlperf.recipe import Recipe
from wan_mlperf.step_plan import Step
from wan_mlperf.workload import Workload

STAGES = ("text_encode", "denoise_high", "denoise_low", "vae_decode")
SMALL = 0.02  # of the whole: a stage that is off by less is not named


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What the model says of a run: seconds per stage and in all, the band, and the stages that lie outside it, in words."""

    hardware: str
    seconds: float
    band: tuple[float, float]
    stages: dict[str, float]
    apart: tuple[str, ...] = ()
    unknown: str = ""


def predict_run(
    recipe: Recipe,
    workload: Workload,
    plan: Sequence[Step],
    shape: Shape,
    *,
    device_name: str,
    kernels: Mapping[str, str],
    size: ExpertSize,
    measured: Mapping[str, float],
) -> Predicted | None:
    """Return the prediction of a run on this device, None on hardware that is not known.

    `kernels` is recipe name -> xDiT backend as it was resolved; `measured` mean seconds per stage of one sample.
    """
    gpu = hardware.of_device(device_name)
    if gpu is None:
        return None
    prices = Prices(gpu=gpu, shape=shape, workload=workload, size=size, ways=ways_of(recipe), kernels=dict(kernels))
    try:
        whole = prices.plan(plan)
        stages = stages_of(prices, plan)
    except BadInput as error:
        return Predicted(hardware=gpu.name, seconds=0.0, band=(0.0, 0.0), stages={}, unknown=str(error))
    low, high = (edge / whole.seconds for edge in whole.band)
    apart = [
        f"{stage.replace('_', ' ')}: {measured[stage]:.2f} s measured, {seconds:.2f} s predicted"
        for stage, seconds in stages.items()
        if not low * seconds <= measured.get(stage, seconds) <= high * seconds
        and abs(measured[stage] - seconds) > SMALL * whole.seconds
    ]
    return Predicted(hardware=gpu.name, seconds=whole.seconds, band=whole.band, stages=stages, apart=tuple(apart))


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
