"""One recipe on one kind of hardware: rehearsed, priced, and compared with its memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wan_mlperf import checkpoint
from wan_mlperf.checkpoint import HUB_NAME
from wan_mlperf.parallel.mesh import Shape
from wan_mlperf.predict import hardware, rates, rehearsal, work
from wan_mlperf.predict.counting import Counts
from wan_mlperf.predict.from_recipe import device_of, kernels_of, prices_of, shape_of
from wan_mlperf.predict.hardware import Hardware
from wan_mlperf.predict.memory import Need, need_of, worst
from wan_mlperf.predict.prices import CROSS, Prediction, Prices, Seconds
from wan_mlperf.predict.rates import Constants
from wan_mlperf.predict.rehearsal import RankCounts
from wan_mlperf.predict.subject import Subject
from wan_mlperf.recipe import Recipe
from wan_mlperf.step_plan import Step, make_plan
from wan_mlperf.workload import Workload

# Loading: each rank reads fp32 weights and casts them, 57 GB of an expert in 40 to 60 s from a warm page cache (docs/gpu.md).
FILES_GB, WARM_GB_S, COLD_GB_S = 126.0, 1.15, 0.4


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a recipe would do on `gpus` GPUs. `ranks` is empty where nothing was rehearsed."""

    recipe: str
    gpu: Hardware
    gpus: int
    shape: Shape
    workload: Workload
    subject: Subject
    prices: Prices
    prediction: Prediction
    ranks: tuple[RankCounts, ...]

    @property
    def samples_per_second(self) -> float:
        """Offline throughput: each replica makes one video after the other."""
        return self.shape.replicas / self.prediction.seconds

    @property
    def need(self) -> Need | None:
        """Memory of the rank that needs most; None without a rehearsal."""
        return worst(self.ranks) if self.ranks else None

    @property
    def load_s(self) -> tuple[float, float]:
        """Seconds to load the published checkpoint: from a warm page cache, and from a disk."""
        return FILES_GB / WARM_GB_S, FILES_GB / COLD_GB_S

    def as_json(self) -> dict[str, object]:
        """What --json writes."""
        low, high = self.prediction.band
        need = self.need
        found: dict[str, object] = {
            "recipe": self.recipe,
            "hardware": self.gpu.name,
            "gpus": self.gpus,
            "mesh": str(self.shape),
            "workload": {name: getattr(self.workload, name) for name in ("height", "width", "frames", "steps")},
            "seconds": self.prediction.seconds,
            "samples_per_second": self.samples_per_second,
            "parts": self.prediction.parts,
            "band": [low, high],
            "memory_gb": None if need is None else round(need.total, 2),
            "memory_available_gb": round(self.gpu.memory / 1e9, 2),
            "memory_lacking_gb": None if need is None else round(need.lacks(self.gpu), 2),
            "kernels": {name: dataclasses.asdict(rate) for name, rate in self.prediction.kernels.items()},
            "load_s": list(self.load_s),
            "ranks": [_rank_json(rank) for rank in self.ranks],
        }
        return found


def forecast(
    recipe: Recipe,
    gpu: Hardware | str,
    *,
    gpus: int,
    workload: Workload | None = None,
    kernels: Mapping[str, str] | None = None,
    constants: Constants | None = None,
    rehearsed: bool = True,
    workers: int = 1,
) -> Forecast:
    """Predict a recipe on hardware. Raises BadInput for what cannot run there or has no published rate."""
    gpu = hardware.find(gpu) if isinstance(gpu, str) else gpu
    subject = subject_of(recipe, gpu, gpus=gpus, workload=workload, kernels=kernels)
    size = work.size_of_expert(subject.configs["transformer"])
    prices = prices_of(recipe, gpu, gpus=gpus, workload=subject.workload, size=size, kernels=kernels, constants=constants)
    ranks = tuple(rehearsal.rehearse(subject, workers=workers)) if rehearsed else ()
    prediction = prices.plan(subject.plan)
    if ranks:
        used = {step.attention for step in subject.plan if step.source is None}
        formats = prices.formats(step for step in subject.plan if step.source is None)
        priced = [seconds_of(rank, prices, subject.plan) for rank in ranks if len(rank.stages) > 1]
        slowest = max(priced, key=lambda seconds: seconds.total)
        prediction = prices.predict(slowest, used, formats)
    return Forecast(
        recipe=recipe.name,
        gpu=gpu,
        gpus=gpus,
        shape=prices.shape,
        workload=subject.workload,
        subject=subject,
        prices=prices,
        prediction=prediction,
        ranks=ranks,
    )


def subject_of(
    recipe: Recipe, gpu: Hardware, *, gpus: int, workload: Workload | None = None, kernels: Mapping[str, str] | None = None
) -> Subject:
    """Return what to rehearse: with the published configuration for the hub's checkpoint, else with the folder's own."""
    workload = workload or recipe.effective_workload
    plan = make_plan(recipe, workload)
    configs = configs_of(recipe.model.checkpoint)
    size = work.size_of_expert(configs["transformer"])
    return Subject(
        recipe=recipe,
        workload=workload,
        plan=plan,
        shape=shape_of(recipe, workload, size, gpus=gpus, fabric=device_of(gpu).fabric),
        device=device_of(gpu),
        configs=configs,
        kernels=kernels_of({step.attention for step in plan}, gpu, kernels or {}),
    )


def configs_of(name: str) -> dict[str, dict[str, Any]]:
    """Part -> configuration of the checkpoint that a recipe names."""
    if name == HUB_NAME:
        published = {part: work.published_config(part) for part in ("transformer", "vae", "text_encoder")}
        return {**published, "transformer_2": published["transformer"]}
    found = checkpoint.find(name)
    return {part: found.config(part) for part in ("transformer", "transformer_2", "vae", "text_encoder")}


def seconds_of(rank: RankCounts, prices: Prices, plan: Sequence[Step]) -> Seconds:
    """Seconds of a rehearsed rank: what it counted, at the rates and constants of a price from first principles."""
    total = prices.text_encode() + prices.decode() + prices.host()
    for step in plan:
        total += Seconds(elementwise=prices.step(step).elementwise)
    for stage, counts in rank.stages.items():
        if stage not in ("text_encode", "vae_decode"):
            unguided = "unguided" in stage
            shape = prices.unguided_shape if unguided else prices.shape
            total += _seconds_of_stage(counts, prices, shape.ulysses, hidden=0.0 if unguided else prices.ways.hidden)
    return total


def _seconds_of_stage(counts: Counts, prices: Prices, ulysses: int, *, hidden: float) -> Seconds:
    attention = gemm = 0.0
    for name, flops in counts.flops.items():
        kind, _, which = name.partition(" ")
        if kind == "attention":
            rate = (
                CROSS * prices.gpu.peak("bf16") if which == "cross" else rates.attention(which, prices.gpu, prices.values).flops
            )
            attention += flops / rate
        elif kind == "gemm" and which in rates.GEMM_FORMATS:
            gemm += flops / rates.gemm(which, prices.gpu, prices.values).flops
    # Q, K and V start one after another, as if in one call: four calls per layer count as two. Interleaved branches make two.
    layers_exchanged = counts.calls["all_to_all ulysses"] / (1 if hidden else 2)
    sent = sum(counts.sent.values()) / prices.usable_bandwidth(ulysses)
    exchange = sent + layers_exchanged * prices.values["collective_us"] * 1e-6
    return Seconds(attention=attention, gemm=gemm, exchange=exchange - min(hidden * exchange, attention + gemm))


def _rank_json(rank: RankCounts) -> dict[str, object]:
    need = need_of(rank)
    return {
        "rank": rank.rank,
        "memory_gb": round(need.total, 2),
        "weights_gb": {name: round(size, 3) for name, size in need.weights.items()},
        "stages": {
            name: {
                "calls": dict(counts.calls),
                "flops": dict(counts.flops),
                "bytes_read": counts.read,
                "bytes_written": counts.written,
                "bytes_sent": dict(counts.sent),
                "messages": dict(counts.messages),
                "peak_gb": round(counts.peak / 1e9, 3),
                "shapes": counts.shapes,
            }
            for name, counts in rank.stages.items()
        },
    }
