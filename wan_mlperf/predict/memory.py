"""What fits: each rank's rehearsed peak against a GPU's memory, and what another decode or format would need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from wan_mlperf.predict import rehearsal
from wan_mlperf.predict.hardware import Hardware
from wan_mlperf.predict.rehearsal import RankCounts
from wan_mlperf.predict.subject import Subject, expert_bytes

# Besides the tensors that a rehearsal sees: the driver's context, the libraries' workspaces, NCCL's or RCCL's buffers, and 4 %
# that the allocator cannot use. Not measured here: typical values for such PyTorch processes.
RESERVE_GB, FRAGMENTED = 2.0, 0.04
CHUNKS = (1, 2, 4)
FORMATS = ("bf16", "fp8", "mxfp4")


@dataclass(frozen=True, kw_only=True)
class Need:
    """GB (10^9 bytes) that one rank needs at its peak, by what needs it; `stage` is when."""

    rank: int
    weights: dict[str, float]
    activations: float
    stage: str

    @property
    def total(self) -> float:
        """GB in all, with what a rehearsal does not see."""
        return (sum(self.weights.values()) + self.activations) * (1 + FRAGMENTED) + RESERVE_GB

    def lacks(self, gpu: Hardware) -> float:
        """GB missing on a GPU, 0 if it fits."""
        return max(0.0, self.total - gpu.memory / 1e9)


def need_of(rank: RankCounts) -> Need:
    """Return what a rehearsed rank needs."""
    weights = {name: size / 1e9 for name, size in rank.weights.items()}
    stage = max(rank.stages, key=lambda name: rank.stages[name].peak)
    return Need(rank=rank.rank, weights=weights, activations=rank.peak / 1e9 - sum(weights.values()), stage=stage)


def worst(ranks: Sequence[RankCounts]) -> Need:
    """Return the need of the rank that needs most."""
    return max((need_of(rank) for rank in ranks), key=lambda need: need.total)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One way to run: format of the experts, dtype and chunk of the decode, and what a rank needs."""

    gemm: str
    vae_dtype: str
    chunk: int
    need: Need


def other_ways(subject: Subject, ranks: Sequence[RankCounts], *, workers: int) -> list[Fit]:
    """Return what a rank needs with each dtype and chunk of the decode and each format of the experts.

    Only decodes are rehearsed again: a format changes weights, whose sizes are known.
    """
    subjects = [_with(subject, dtype, chunk) for dtype in ("float32", "bfloat16") for chunk in CHUNKS]
    decodes = rehearsal.rehearse_decodes(subjects, workers=workers)
    denoising = max(_above_weights(rank, name) for rank in ranks for name in rank.stages if name != "vae_decode")
    fits = []
    for one, decode in zip(subjects, decodes, strict=True):
        decoding = _above_weights(decode, "vae_decode")
        for name in FORMATS:
            experts = {expert: expert_bytes(subject, expert, name) for expert in ("high_noise", "low_noise")}
            weights = {**ranks[0].weights, **decode.weights, **experts}
            need = Need(
                rank=0,
                weights={part: size / 1e9 for part, size in weights.items()},
                activations=max(denoising, decoding) / 1e9,
                stage="vae_decode" if decoding > denoising else "denoising",
            )
            fits.append(Fit(gemm=name, vae_dtype=one.recipe.model.vae_dtype, chunk=one.recipe.vae.chunk, need=need))
    return fits


def _above_weights(rank: RankCounts, stage: str) -> float:
    return rank.stages[stage].peak - sum(rank.weights.values())


def _with(subject: Subject, dtype: Literal["float32", "bfloat16"], chunk: int) -> Subject:
    recipe = subject.recipe
    changed = replace(recipe, model=replace(recipe.model, vae_dtype=dtype), vae=replace(recipe.vae, chunk=chunk))
    return replace(subject, recipe=changed)
