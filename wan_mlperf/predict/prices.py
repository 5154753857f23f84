"""Seconds of forwards, decodes and whole plans on hardware that is not here. For `predict`, `search`, `report`.

    prices = from_recipe.prices_of(recipe, "mi355x", gpus=8)
    prices.forward(attention="sage_fp4", gemm="mxfp4").total     # one forward of one branch, s
    prices.plan(make_plan(recipe, workload)).seconds             # one video, with .band and .parts

The model: attention, linear layers, passes over memory and exchange follow one another, each at a rate that was published or
fitted to published runs (rates.json, constants.json; how well it holds: docs/results/predict.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from wan_mlperf.parallel.mesh import Shape
from wan_mlperf.predict import rates, work
from wan_mlperf.predict.hardware import Hardware
from wan_mlperf.predict.rates import Constants
from wan_mlperf.predict.work import WAN22, ExpertSize
from wan_mlperf.step_plan import Layers
from wan_mlperf.workload import MLPERF, Workload

PARTS = ("text_encode", "attention", "gemm", "elementwise", "exchange", "vae_decode", "host")
STREAM = 0.8  # share of the memory bandwidth that elementwise kernels reach
CROSS = 0.4  # share of bf16's dense peak that cross-attention over a short text reaches
# Share of an exchange that the other branch's computation hides (parallel/interleave.py). An assumption: nobody has published it
# for this order, and it has not been measured here. The rest stands for the compute units and the memory bandwidth that the
# collective's kernels take, and for the first and the last exchange of a forward pass, which nothing hides.
HIDDEN = 0.8
DECODE_RANKS = 8  # more ranks do not decode faster: TensorRT-LLM's blog 25, 0.83 s on 8 ranks, 0.85 s on 16
DECODE_REST = 0.15  # share of a one-rank decode that each of several ranks still takes
TEXT_SHARE = 0.5  # share of bf16's dense peak that the text encoder reaches


class Step(Protocol):
    """What pricing needs to know of a step of the plan."""

    @property
    def attention(self) -> str: ...
    @property
    def gemm(self) -> str: ...
    @property
    def layers(self) -> Layers: ...
    @property
    def guided(self) -> bool: ...
    @property
    def source(self) -> int | None: ...


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Seconds by part."""

    text_encode: float = 0.0
    attention: float = 0.0
    gemm: float = 0.0
    elementwise: float = 0.0
    exchange: float = 0.0
    vae_decode: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        """The sum of all parts, which follow one another."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """Part -> seconds, in the order of PARTS."""
        return {name: getattr(self, name) for name in PARTS}

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(**{name: getattr(self, name) + getattr(other, name) for name in PARTS})

    def __mul__(self, times: float) -> Seconds:
        return Seconds(**{name: getattr(self, name) * times for name in PARTS})


@dataclass(frozen=True, kw_only=True)
class Ways:
    """How the work is done, where a recipe (or somebody else's run) has a choice that is not in the plan.

    `hidden` is the share of the exchange that computation covers in steps with guidance (`HIDDEN`, where both branches are on the
    same ranks and take turns), as long as there is as much computation; `passes` over the tokens per layer replaces the fitted
    number (fusion lowers it); `decode_ranks` None is every rank of the replica; `attn2d` (rows, columns) is TensorRT-LLM's split
    of attention; `served`: behind an HTTP server, whose response is a written video; `own_decoder`: the VAE is decoded by us.
    """

    compiled: bool = True
    qkv_bytes: float = 2.0
    output_bytes: float = 2.0
    hidden: float = 0.0
    passes: float | None = None
    decode_float32: bool = False
    decode_ranks: int | None = None
    attn2d: tuple[int, int] = (1, 1)
    served: bool = False
    own_decoder: bool = False
    text_tokens: int = 512


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One video: `seconds` and their `parts`, the `band` (low, high) that would hold four of five published runs, the rates."""

    seconds: float
    parts: dict[str, float]
    band: tuple[float, float]
    kernels: dict[str, rates.Rate]


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices on one GPU model for one mesh, size of video and model. `kernels` is recipe name -> kernel of rates.json."""

    gpu: Hardware
    shape: Shape
    workload: Workload = MLPERF
    size: ExpertSize = WAN22
    ways: Ways = field(default_factory=Ways)
    kernels: Mapping[str, str]
    constants: Constants | None = None

    @property
    def values(self) -> Constants:
        """These constants, or the shipped ones."""
        return self.constants or rates.constants()

    @property
    def ranks(self) -> int:
        """How many ranks share the tokens of one forward."""
        return self.shape.ulysses * self.shape.ring * math.prod(self.ways.attn2d)

    def forward(self, *, attention: str, gemm: str, layers: Layers = ()) -> Seconds:
        """One forward of one branch of guidance, on every rank that shares it. Raises BadInput for an unknown rate.

        `layers` are those of the step: patterns of names with another format.
        """
        shares = work.gemm_shares(gemm, layers, self.size)
        values, tokens = self.values, work.tokens_of(self.workload, self.size)
        flops = work.forward_flops(tokens, replace(self.size, text_tokens=self.ways.text_tokens))
        passes = self.ways.passes or values["passes_compiled" if self.ways.compiled else "passes_eager"]
        share = tokens / self.ranks
        seconds = Seconds(
            attention=flops.attention / self.ranks / rates.attention(self.kernel(attention), self.gpu, values).flops
            + flops.cross_attention / self.ranks / (CROSS * self.gpu.peak("bf16")),
            gemm=sum(
                share_of * flops.gemm / self.ranks / rates.gemm(name, self.gpu, values).flops for name, share_of in shares.items()
            ),
            elementwise=passes * self.size.layers * share * self.size.width * 2 / (STREAM * self.gpu.bandwidth),
        )
        exchange = self._exchange(tokens)
        return replace(seconds, exchange=exchange - min(self.ways.hidden * exchange, seconds.total))

    def step(self, step: Step) -> Seconds:
        """One denoising step: both branches of guidance, side by side with CFG 2; without guidance one, over all of the ranks.

        A step that applies an earlier change again costs two layers of about 120, which is left out.
        """
        if step.source is not None:
            return Seconds()
        if step.guided:
            return self.forward(attention=step.attention, gemm=step.gemm, layers=step.layers) * (2 / self.shape.cfg)
        alone = replace(self.ways, hidden=0.0)  # there is no other branch to compute meanwhile
        prices = replace(self, shape=self.unguided_shape, ways=alone)
        return prices.forward(attention=step.attention, gemm=step.gemm, layers=step.layers)

    @property
    def unguided_shape(self) -> Shape:
        """The mesh of a step without guidance: all of the replica's ranks share the one branch."""
        return replace(self.shape, cfg=1, ulysses=self.shape.cfg * self.shape.ulysses)

    def decode(self) -> Seconds:
        """The VAE decode: bound by memory, on a few GPUs by its products, with a rest that does not shrink with more ranks."""
        amd = self.gpu.arch.startswith("gfx")
        own = self.ways.own_decoder and not amd  # ours has not been measured on AMD's, so the other programs' bytes stand for it
        moved = self.values["vae_amd_tb" if amd else "vae_own_tb" if own else "vae_nvidia_tb"]
        moved *= 1e12 * work.tokens_of(self.workload) / work.tokens_of(MLPERF)
        ranks = min(self.ways.decode_ranks or self.shape.per_replica, DECODE_RANKS)
        wide = 2 if self.ways.decode_float32 else 1  # twice the bytes; and on NVIDIA TF32, with half of bf16's peak
        bytes_wide = self.values["vae_own_wide"] if own and self.ways.decode_float32 else wide
        products = work.DECODE_FLOPS * work.tokens_of(self.workload) / work.tokens_of(MLPERF)
        one = max(
            moved * bytes_wide / self.gpu.bandwidth, products * wide / (self.values["decode_share"] * self.gpu.peak("bf16"))
        )
        return Seconds(vae_decode=one * (1 / ranks + (DECODE_REST if ranks > 1 else 0.0)))

    def text_encode(self) -> Seconds:
        """The text encoder on both prompts, or with CFG 2 on one of them."""
        numbers = work.text_encoder_numbers()
        flops = 2.0 * numbers * 512
        one = flops / (TEXT_SHARE * self.gpu.peak("bf16")) + 2 * numbers / (STREAM * self.gpu.bandwidth)
        return Seconds(text_encode=one * 2 / self.shape.cfg)

    def host(self) -> Seconds:
        """What a video takes outside the GPU: launches, scheduler, copies; behind a server also writing and sending it."""
        return Seconds(host=self.values["serve_s" if self.ways.served else "host_s"])

    def plan(self, steps: Iterable[Step]) -> Prediction:
        """One video by this plan."""
        chosen = list(steps)
        total = self.text_encode() + self.decode() + self.host()
        for step in chosen:
            total += self.step(step)
        computed = [step for step in chosen if step.source is None]
        return self.predict(total, {step.attention for step in computed}, self.formats(computed))

    def formats(self, steps: Iterable[Step]) -> set[str]:
        """The formats of the linear layers in these steps."""
        return {name for step in steps for name in work.gemm_shares(step.gemm, step.layers, self.size)}

    def predict(self, total: Seconds, attention: Iterable[str], gemm: Iterable[str]) -> Prediction:
        """Put a band around the seconds `total`, which these kernels and formats made up."""
        used = {name: rates.attention(self.kernel(name), self.gpu, self.values) for name in sorted(attention)}
        used |= {f"gemm {name}": rates.gemm(name, self.gpu, self.values) for name in sorted(gemm)}
        whole, kernel = rates.residuals()
        unseen = all(rate.fitted for name, rate in used.items() if not name.startswith("gemm"))
        extra = 0.0 if unseen else kernel * total.attention / total.total
        width = math.hypot(whole, extra)
        return Prediction(
            seconds=total.total,
            parts=total.parts,
            band=(total.total / (1 + width), total.total * (1 + width)),
            kernels=used,
        )

    def kernel(self, name: str) -> str:
        """The kernel of rates.json that a name in the recipe means here."""
        return self.kernels.get(name, name)

    def usable_bandwidth(self, ulysses: int) -> float:
        """Bytes/s that one GPU sends in an exchange among `ulysses` GPUs: in a mesh a group has only the links within it."""
        links = max(1, ulysses - 1) if self.gpu.fabric == "mesh" else 1
        return links * self.gpu.link_gb_s * 1e9 * self.values[f"{self.gpu.fabric}_share"]

    def _exchange(self, tokens: int) -> float:
        """Seconds of one forward's exchange within the group that shares the tokens."""
        shape, (rows, columns) = self.shape, self.ways.attn2d
        usable, seconds, collectives = self.usable_bandwidth(shape.ulysses), 0.0, 0
        share = tokens / self.ranks * self.size.width * self.size.layers
        if shape.ulysses > 1:
            sent = work.exchange_bytes(
                tokens,
                shape.ulysses,
                self.size,
                qkv_bytes=self.ways.qkv_bytes,
                output_bytes=self.ways.output_bytes,
                ranks=self.ranks,
            )
            seconds, collectives = sent / usable, 2
        if rows * columns > 1:  # Q within the rows, K and V within the columns, then the partial outputs within the rows
            seconds += share * 2 * (2 * (columns - 1) + 2 * (rows - 1)) / usable
            collectives += 3
        if shape.ring > 1:  # attention over one share hides the next one's transfer; only starting each takes time
            collectives += shape.ring - 1
        return seconds + collectives * self.size.layers * self.values["collective_us"] * 1e-6
