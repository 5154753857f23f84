"""What a step costs: seconds on hardware that is not here, seconds measured in a run on this machine, or forward passes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sut import result as results
from wan_mlperf.errors import BadInput
from wan_mlperf.predict import from_recipe, hardware, rates
from wan_mlperf.predict.prices import Prices
from wan_mlperf.recipe import Attention, AttentionName, Gemm, GemmName, Recipe
from wan_mlperf.search.choices import Options, Schedule, of_recipe
from wan_mlperf.search.programme import Price
from wan_mlperf.step_plan import Step

ATTENTION: tuple[AttentionName, ...] = ("sdpa", "sage_fp8", "sage_fp4")
GEMM: tuple[GemmName, ...] = ("bf16", "fp8", "mxfp4")


@dataclass(frozen=True, kw_only=True)
class Pricing:
    """`step` costs one step of a plan, `fixed` everything else of a video, both in `unit`; `source` says where they come from.

    `attention` and `gemm` are the kernels and formats that have a separate price. Without any, the recipe's own are kept.
    """

    step: Price
    fixed: float
    unit: str
    source: str
    attention: tuple[AttentionName, ...]
    gemm: tuple[GemmName, ...]
    prices: Prices | None = None

    def total(self, plan: Sequence[Step]) -> float:
        """Return what a whole video costs."""
        return self.fixed + sum(self.step(step) for step in plan)

    def band(self, plan: Sequence[Step]) -> tuple[float, float] | None:
        """Return the range that the seconds should be in, if they are predicted."""
        return self.prices.plan(plan).band if self.prices else None

    def options(self, own: Schedule, *, skip: bool) -> Options:
        """Return what the search may choose from. Where nothing else has a price, that is the recipe's `own` schedule."""
        attention = tuple(self.attention or (kernel,) for kernel in own.attention)
        formats = tuple(itertools.product(self.gemm, self.gemm)) or (own.formats(),)
        return Options(attention=attention, formats=formats, skip=skip)


def on_hardware(recipe: Recipe, name: str, gpus: int) -> Pricing:
    """Return prices from the latency model, for every kernel and format with a published rate there. Raises BadInput."""
    gpu = hardware.find(name)
    attention = tuple(one for one in ATTENTION if _known(_rate, one, gpu))
    gemm = tuple(one for one in GEMM if _known(rates.gemm, one, gpu))
    if "sdpa" not in attention:
        raise BadInput(f"--hardware {name!r}: no published rate of bf16 attention there; allowed: hardware that has one")
    every = dataclasses.replace(recipe, attention=Attention(), gemm=Gemm())
    prices = from_recipe.prices_of(every, gpu, gpus=gpus, kernels=from_recipe.kernels_of(attention, gpu, {}))
    rest = prices.text_encode() + prices.decode() + prices.host()
    return Pricing(
        step=lambda step: prices.step(step).total,
        fixed=rest.total,
        unit="s",
        source=f"predicted for {gpus} x {gpu.name}, {prices.shape}",
        attention=attention,
        gemm=gemm,
        prices=prices,
    )


def of_run(recipe: Recipe, folder: Path, plan: Sequence[Step]) -> Pricing:
    """Return prices from a finished run's seconds per forward pass. Kernels and formats stay as they are. Raises BadInput."""
    try:
        result = results.read(folder)
    except BadInput as error:
        raise BadInput(f"--seconds-from: {error}") from None
    spans, ran = result.spans, result.plan
    own = of_recipe(recipe, plan)
    if [step.attention for step in ran] != list(own.attention) or result.recipe != recipe.name:
        raise BadInput(f"--seconds-from {str(folder)!r}: a run of recipe {result.recipe!r}; allowed: one of {recipe.name!r}")
    seconds = {}
    for expert, span in (("high_noise", "denoise_high"), ("low_noise", "denoise_low")):
        forwards = sum(step.forwards for step in ran if step.expert == expert)
        seconds[expert] = spans[span] / max(1, forwards)
    return Pricing(
        step=lambda step: step.forwards * seconds[step.expert],
        fixed=sum(value for name, value in spans.items() if not name.startswith("denoise")),
        unit="s",
        source=f"measured in {folder.name}",
        attention=(),
        gemm=(),
    )


def by_forwards() -> Pricing:
    """Return prices in forward passes of an expert, whatever its kernels and formats: nothing else is known of this machine."""
    return Pricing(
        step=lambda step: step.forwards, fixed=0.0, unit="forward passes", source="forward passes", attention=(), gemm=()
    )


def _rate(name: str, gpu: hardware.Hardware) -> rates.Rate:
    return rates.attention(from_recipe.kernels_of([name], gpu, {})[name], gpu)


def _known(rate: Callable[[str, hardware.Hardware], rates.Rate], name: str, gpu: hardware.Hardware) -> bool:
    try:
        rate(name, gpu)
    except BadInput:
        return False
    return True
