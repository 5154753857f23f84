"""What a recipe may say: its parts, keys, types and ranges. The benchmark's own values are not here: see workload.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from wan_mlperf.inputs.paths import expand
from wan_mlperf.workload import MLPERF, Workload

FILLED = {"folder", "exact"}  # fields that only the loader sets
STRICT = ConfigDict(extra="forbid", strict=True)

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1, le=4096)]
StepIndex = Annotated[int, Field(ge=0, le=999)]
Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Dtype = Literal["checkpoint", "bfloat16", "float32"]
AttentionName = Literal["sdpa", "sage_fp8", "sage_fp4"]
GemmName = Literal["bf16", "fp8", "mxfp4"]
ExchangeName = Literal["bf16", "fp8"]
Arch = Literal["gfx950", "gfx942", "sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120"]
# May a PyTorch reference stand in for a kernel that this device lacks, and for which architecture's? allow: for gfx950's.
References = Literal["forbid", "allow"] | Arch


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Model:
    """Which weights, and the dtype they compute in (`checkpoint`: the one in which diffusers loads each part by itself)."""

    checkpoint: str = "embedded"
    dtype: Dtype = "bfloat16"
    vae_dtype: Dtype = "float32"
    fixed_latent: str | None = None  # MLCommons' fixed_latent.pt; without it the noise is drawn from the seed


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshRecipe:
    """How the ranks are used: world = replicas x cfg x ulysses x ring.

    `ranks` is how many ranks `python -m wan_mlperf.run` starts (auto: one per GPU, or two without a GPU); torchrun decides for
    itself. cfg auto is 1 if every pair of GPUs has its own link (AMD Instinct), otherwise 2 for an even number of ranks; ulysses
    auto takes what is left. `interleave`: with cfg 1, may one branch of guidance compute while the other exchanges? The results
    are the same. auto does so on GPUs; a CPU's cores would have to do both, so there both branches are one batch. With false, one
    branch follows the other everywhere.
    """

    ranks: Count | Auto = "auto"
    replicas: Count | Auto = 1
    cfg: Literal[1, 2] | Auto = "auto"
    ulysses: Count | Auto = "auto"
    ring: Count = 1
    interleave: bool | Auto = "auto"
    span_hosts: bool = False  # may one replica use ranks of several hosts?

    @model_validator(mode="after")
    def _one_unknown(self) -> MeshRecipe:
        if self.replicas == "auto" and self.ulysses == "auto":
            raise ValueError("replicas and ulysses cannot both be auto; allowed: give one of them a number")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Attention:
    """Kernel of self-attention per step: `early` for the first `early_fraction` of the steps, then `late`; or `steps`, a list.

    `cross`: cross-attention by PyTorch's sdpa, which reads the bias of a trimmed text, or by the device's native kernel, whose
    output the trimmed padding is merged into by its log-sum-exp: the same except for rounding.
    """

    early: AttentionName = "sdpa"
    late: AttentionName = "sdpa"
    early_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.85
    steps: tuple[AttentionName, ...] | None = None
    smooth_k: bool = False  # only low-precision kernels that subtract K's mean over the tokens, though others may be faster
    cross: Literal["sdpa", "native"] = "sdpa"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Guidance:
    """Which steps compute both branches of guidance. The others use the positive branch's prediction alone.

    A step is guided if its noise level sigma (1 is noise, 0 the video) is within `interval` and its index is not in `off`.
    """

    interval: tuple[Unit, Unit] = (0.0, 1.0)
    off: tuple[StepIndex, ...] = ()

    @model_validator(mode="after")
    def _in_order(self) -> Guidance:
        if self.interval[0] > self.interval[1]:
            raise ValueError("interval ends below its start; allowed: [lowest sigma, highest sigma], such as [0.2, 1.0]")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Reuse:
    """Steps that do not run the expert, but apply again what its blocks changed in the last computed step.

    `factors` scales that change, one number per entry of `steps` (MagCache). Without it the change is not scaled.
    """

    steps: tuple[StepIndex, ...] = ()
    factors: tuple[Annotated[float, Field(gt=0.0, le=10.0)], ...] | None = None

    @model_validator(mode="after")
    def _fitting(self) -> Reuse:
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError("steps are not in order; allowed: indices of steps, each once, rising")
        if self.factors is not None and len(self.factors) != len(self.steps):
            raise ValueError(f"factors has {len(self.factors)} entries; allowed: one per step of reuse.steps, {len(self.steps)}")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Keep:
    """Another format for the layers whose names match a pattern: of one expert or both, in steps `[first, last]` or in all."""

    layers: str
    format: GemmName
    expert: Literal["high_noise", "low_noise"] | None = None
    steps: tuple[StepIndex, StepIndex] | None = None

    @model_validator(mode="after")
    def _rising(self) -> Keep:
        if self.steps is not None and self.steps[0] > self.steps[1]:
            raise ValueError("steps ends before it starts; allowed: the first and the last step, both included")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Gemm:
    """Format of each expert's linear layers. `keep` makes exceptions, as [pattern, format] or a `Keep`; the first match counts.

    `fp8_scales`: one per row of the weight and per token, or one per tensor.
    """

    high_noise: GemmName = "bf16"
    low_noise: GemmName = "bf16"
    keep: tuple[tuple[str, Literal["bf16", "fp8"]] | Keep, ...] = ()
    fp8_scales: Literal["row", "tensor"] = "row"

    @property
    def rules(self) -> tuple[Keep, ...]:
        """`keep`, all written out."""
        return tuple(one if isinstance(one, Keep) else Keep(layers=one[0], format=one[1]) for one in self.keep)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Vae:
    """`chunk`: latent frames per decoder call after the first one. More is faster and takes more memory.

    `tf32`: may an NVIDIA GPU round the inputs of fp32 convolutions to TF32, as PyTorch does by default?
    """

    chunk: Count = 1
    tf32: bool = True


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Compile:
    """torch.compile, per part."""

    experts: bool = False
    decoder: bool = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Offline:
    """`batch`: how many samples a replica makes at once, as long as enough are left; for devices that one sample cannot fill."""

    batch: Annotated[int, Field(ge=1, le=64)] = 1


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Faults:
    """When a rank is declared dead, in seconds: after `dead_s` without a heartbeat, or `hang_s` without progress in a sample.

    Before the first sample, `start_s` counts instead of `hang_s`. Progress is a denoising step or a chunk of the decoder, so
    `hang_s` must be longer than either takes.
    """

    dead_s: Annotated[float, Field(ge=1.0, le=86400.0)] = 30.0
    hang_s: Annotated[float, Field(ge=1.0, le=86400.0)] = 60.0
    start_s: Annotated[float, Field(ge=1.0, le=86400.0)] = 1800.0

    @model_validator(mode="after")
    def _in_order(self) -> Faults:
        if self.hang_s < self.dead_s:
            raise ValueError(
                "hang_s is below dead_s; allowed: at least dead_s, so that a dead rank is named before those it keeps waiting"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """One complete run. configs/ has one for each use."""

    name: str
    model: Model = Model()
    workload: Workload | None = None  # only for a model other than the benchmark's: see workload.py
    mesh: MeshRecipe = MeshRecipe()
    attention: Attention = Attention()
    guidance: Guidance = Guidance()
    reuse: Reuse = Reuse()
    gemm: Gemm = Gemm()
    references: References = "forbid"
    # Q, K and V between the ranks that share a video's tokens: as the model computes them, or as E4M3 (kernels/e4m3.py). Where
    # one rank has all tokens, nothing is exchanged and nothing rounded.
    exchange: ExchangeName = "bf16"
    trim_text: bool = False  # replace the text's padding tokens by one, with the log of their number as bias
    vae: Vae = Vae()
    compile: Compile = Compile()
    offline: Offline = Offline()
    faults: Faults = Faults()
    warmup_queries: Annotated[int, Field(ge=0, le=100)] = 1
    user_conf: str = "mlperf/user.conf"  # LoadGen's settings, relative to the recipe's folder
    folder: str = ""  # filled in by the loader: the recipe's folder
    exact: bool = False  # filled in by make_exact

    @property
    def effective_workload(self) -> Workload:
        """The workload of this run: the benchmark's, unless the recipe has its own."""
        return self.workload or MLPERF

    def is_bitwise(self, ranks: int) -> bool:
        """Must a replica of so many ranks give diffusers' result bit for bit, so that nothing may even round in another order?"""
        return self.exact and ranks == 1

    @property
    def stands_for(self) -> Arch | None:
        """The architecture whose kernels PyTorch references may imitate, or None if references are forbidden."""
        if self.references == "forbid":
            return None
        return "gfx950" if self.references == "allow" else self.references

    @property
    def user_conf_path(self) -> Path:
        """Path of LoadGen's user.conf."""
        return Path(self.folder) / expand(self.user_conf, what="user_conf")


def make_exact(recipe: Recipe) -> Recipe:
    """Return the recipe with every approximation off, each part in the dtype in which diffusers loads it by itself.

    What only changes the order of rounding (`trim_text`, `vae.chunk`) stays on several ranks, which split sums differently
    anyway. On one rank the pipeline turns it off, too, and equals diffusers' bit for bit.
    """
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, dtype="checkpoint", vae_dtype="checkpoint"),
        attention=Attention(),
        guidance=Guidance(),
        reuse=Reuse(),
        gemm=Gemm(),
        exchange="bf16",
        compile=Compile(),
        exact=True,
    )
