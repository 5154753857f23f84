"""A video rehearsed: the pipeline's own code at its full size on fake tensors, as one rank after another of a fake group.

Nothing is computed and no weights are read. Attention and quantised linear layers are records of the kernels that the tables
choose for the hardware; all else runs: embeddings, blocks, exchange, guidance, the sharded decode. Each kind of step runs once
and is multiplied by the plan; each kind of rank runs (the first of each branch of guidance, edge and middle bands of the decode).

Not seen: what a compiler fuses (bytes are eager's), the scheduler's few operations on the latents, workspaces inside a kernel.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import UMT5Config, UMT5EncoderModel

from wan_mlperf.denoise import Prompt, denoise
from wan_mlperf.experts import Expert, TextKeys
from wan_mlperf.kernels import attention
from wan_mlperf.kernels.attention import Kernel
from wan_mlperf.kernels.device import Device
from wan_mlperf.parallel import fake_ranks, split_experts, split_vae, xdit
from wan_mlperf.parallel.mesh import Mesh, Shape
from wan_mlperf.predict.counting import IGNORED, Counted, Counting, Counts
from wan_mlperf.predict.layers import convert
from wan_mlperf.recipe import Recipe
from wan_mlperf.spans import Spans
from wan_mlperf.step_plan import Step, any_unguided
from wan_mlperf.text_encoder import MAX_TOKENS, Embeds
from wan_mlperf.vae_decode import VaeDecoder
from wan_mlperf.workload import Workload

CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "checkpoint": torch.float32}
# Own tokens of a usual prompt and of the benchmark's negative one; what is trimmed away costs nothing.
PROMPT_TOKENS, NEGATIVE_TOKENS = 60, 126


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is rehearsed. `configs` are the parts' configurations; `device` is asked for kernels, as on that hardware."""

    recipe: Recipe
    workload: Workload
    plan: tuple[Step, ...]
    shape: Shape
    device: Device
    configs: dict[str, dict[str, Any]]
    text_lengths: tuple[int, int] = (PROMPT_TOKENS, NEGATIVE_TOKENS)


@dataclass(frozen=True, kw_only=True)
class RankCounts:
    """One rank's video by stage, and its weights in bytes; the stages' peaks are live bytes, weights included."""

    rank: int
    stages: dict[str, Counts]
    weights: dict[str, float]

    @property
    def peak(self) -> float:
        """Live bytes at most, weights included."""
        return max(counts.peak for counts in self.stages.values())

    @property
    def total(self) -> Counts:
        """All stages together."""
        total = Counts()
        for counts in self.stages.values():
            total = total + counts
        return total


def rehearse(subject: Subject, *, workers: int = 1) -> list[RankCounts]:
    """Rehearse every kind of rank; with `workers` > 1, or where this process has a group, in processes forked from it."""
    duties = ranks_of(subject.shape)
    xdit.load()
    if workers == 1 and not fake_ranks.has_group():
        return [rehearse_rank(subject, rank, denoises) for rank, denoises in duties.items()]
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(duties)), mp_context=context) as pool:
        return list(pool.map(rehearse_rank, [subject] * len(duties), duties, duties.values()))


def cores() -> int:
    """How many processes can rehearse side by side."""
    return len(os.sched_getaffinity(0))


def ranks_of(shape: Shape) -> dict[int, bool]:
    """Rank -> whether it denoises here, as the first of a branch; the others are the edge and middle bands of the decode."""
    size = shape.per_replica
    firsts = range(0, size, size // shape.cfg)
    return {rank: rank in firsts for rank in sorted({*firsts, 0, min(1, size - 1), size - 1})}


def rehearse_rank(subject: Subject, rank: int, denoises: bool) -> RankCounts:
    """Rehearse one rank; without `denoises` only the decode."""
    torch.set_num_threads(1)
    here = replace(subject.device, torch=CPU)
    unguided = any_unguided(subject.plan)
    with fake_ranks.fake_mesh(subject.shape, here, rank, unguided=unguided) as mesh, FakeTensorMode(), torch.no_grad():
        counting = Counting(fake_ranks.groups_of(mesh))
        if mesh.exchange is not None:
            mesh.exchange = Counted(mesh.exchange, counting)
        text_model, experts, decoder = _build(subject, mesh, counting)
        parts: dict[str, Any] = {"text_encoder": text_model, **experts, "vae": decoder.vae}
        held = {name: [*part.parameters(), *part.buffers()] for name, part in parts.items()}
        weights = {name: float(sum(one.nbytes for one in tensors)) for name, tensors in held.items()}
        with counting.active():
            counting.hold([one for tensors in held.values() for one in tensors])
            latents = torch.empty(1, *subject.workload.latent_shape(subject.configs["vae"]["z_dim"]))
            if denoises:
                prompt = _encode(subject, mesh, text_model, counting)
                _denoise(subject, mesh, latents, prompt, experts, counting)
            with counting("vae_decode"):
                for _ in decoder.decode(latents):
                    pass
    return RankCounts(rank=rank, stages=_by_plan(counting.stages, subject.plan), weights=weights)


def _build(subject: Subject, mesh: Mesh, counting: Counting) -> tuple[Any, dict[str, Expert], VaeDecoder]:
    """The parts as pipeline.load makes them, with records in place of kernels that this machine has not."""
    recipe, configs = subject.recipe, subject.configs
    names = [step.attention for step in subject.plan if step.source is None]
    kernels = attention.resolve(
        names,
        subject.device,
        references=recipe.stands_for or (None if subject.device.is_gpu else "gfx950"),
        probe=lambda _key: None,  # every package in place
        smooth_k=recipe.attention.smooth_k,
        ring=subject.shape.ring,
        exact=recipe.exact,
        cross=recipe.attention.cross,
        trim_text=recipe.trim_text,
    )
    recorded = {name: _as_record(name, kernel, subject.device, counting) for name, kernel in kernels.items()}
    self_attend, cross_attend = split_experts.attends(recorded)
    split, unguided_split = split_experts.split(mesh), split_experts.unguided_split(mesh)
    dtype = DTYPES[recipe.model.dtype]
    experts = {}
    for name, part in (("high_noise", "transformer"), ("low_noise", "transformer_2")):
        with _default_dtype(dtype):
            transformer = WanTransformer3DModel.from_config(configs[part]).eval()
        keep_in_fp32(transformer)
        convert(transformer, getattr(recipe.gemm, name), recipe.gemm.keep, counting)
        experts[name] = Expert(
            transformer,
            split=split,
            unguided_split=unguided_split,
            self_attend=self_attend,
            cross_attend=cross_attend,
            trim_text=recipe.trim_text,
            merge_padding=kernels["cross"].lse,
            round_text=subject.device.is_gpu or recipe.attention.cross == "native",
        )
    with _default_dtype(DTYPES[recipe.model.vae_dtype]):
        vae = AutoencoderKLWan.from_config(configs["vae"]).eval()
    _, _, rows, columns = subject.workload.latent_shape(0)
    gather = split_vae.shard_decoder(vae, mesh, latent_height=rows, latent_width=columns)
    # On a GPU PyTorch's own operations run, as in a decode that must be equal bit for bit.
    decoder = VaeDecoder(vae, chunk=recipe.vae.chunk, gather=gather, bitwise=subject.device.is_gpu)
    with _default_dtype(dtype):
        text_model = UMT5EncoderModel(UMT5Config(**configs["text_encoder"])).eval()
    return text_model, experts, decoder


def keep_in_fp32(transformer: Any) -> None:
    """Norms and modulation stay in fp32, as diffusers' from_pretrained leaves them."""
    kept = transformer._keep_in_fp32_modules or []
    for name, parameter in transformer.named_parameters():
        if any(one in name.split(".") for one in kept):
            parent = transformer.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], torch.nn.Parameter(parameter.float(), requires_grad=False))


def _as_record(name: str, kernel: Kernel, device: Device, counting: Counting) -> Kernel:
    if not device.is_gpu and kernel.xdit == "SDPA":
        return kernel  # runs on fake tensors as it is
    shown = name if kernel.is_reference else kernel.backend
    call = counting.kernel(f"{shown}{' cross' if name == 'cross' else ''}")

    def with_lse(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return call(query, key, value), query.new_empty(query.shape[:-1], dtype=torch.float32)

    return replace(kernel, function=with_lse if kernel.lse else call)


def _encode(subject: Subject, mesh: Mesh, model: Any, counting: Counting) -> Prompt:
    """The text encoder on the branches that this rank computes. The tokenizer is not here: lengths are usual ones."""
    embeds = []
    alone = mesh.branch == 1 and any_unguided(subject.plan)
    lengths = mesh.own_branches(subject.text_lengths)
    for length in [*lengths, *([subject.text_lengths[0]] if alone else [])]:
        with counting("text_encode"):
            ids = torch.zeros(1, MAX_TOKENS, dtype=torch.int64)
            hidden = model(ids, torch.ones_like(ids)).last_hidden_state
            embeds.append(Embeds(hidden.to(DTYPES[subject.recipe.model.dtype]), (min(length, MAX_TOKENS),)))
    return Prompt(embeds[: len(lengths)], embeds[-1] if alone else embeds[0])


def _denoise(
    subject: Subject, mesh: Mesh, latents: torch.Tensor, prompt: Prompt, experts: dict[str, Expert], counting: Counting
) -> None:
    """The loop over one step of each kind, each counted as a stage of its own; text keys once per expert, as in a query."""
    counted: Any = {name: _CountedExpert(expert, name, counting) for name, expert in experts.items()}
    scheduler = _NoScheduler(subject.workload.steps)
    for kind, step in kinds_of(subject.plan).items():
        first = [] if step.source is None else [subject.plan[step.source]]
        counting.stage = IGNORED
        _warm(experts[step.expert], [*first, step], latents.to(prompt.positive.hidden.dtype))
        counting.stage = IGNORED if first else kind

        def go_on(_step: Step, _latents: torch.Tensor, kind: str = kind) -> None:
            counting.stage = kind

        denoise(latents, prompt, [*first, step], counted, scheduler, mesh, spans=Spans(CPU), on_step=go_on)
    counting.stage = IGNORED


def _warm(expert: Expert, steps: Sequence[Step], latents: torch.Tensor) -> None:
    """What the first video makes once and keeps: tables that depend on shapes and the schedule."""
    for step in steps:
        expert._modulation_of(step.timestep, latents)
        expert._rotary_of(latents, expert.split if step.guided else expert.unguided_split)


class _CountedExpert:
    """An expert whose text keys are made once, in a stage of their own."""

    def __init__(self, expert: Expert, name: str, counting: Counting) -> None:
        self._expert, self._name, self._counting = expert, name, counting
        self._keys: dict[int, list[TextKeys]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._expert, name)

    def text_keys(self, embeds: Embeds) -> list[TextKeys]:
        """See `Expert.text_keys`."""
        if id(embeds) not in self._keys:
            with self._counting(f"text_keys {self._name}"):
                self._keys[id(embeds)] = self._expert.text_keys(embeds)
        return self._keys[id(embeds)]


class _NoScheduler:
    """In place of UniPC, which reads values: its operations on the latents, some 5 MB, are not seen."""

    def __init__(self, steps: int) -> None:
        self.timesteps = [0.0] * steps

    def step(self, noise: torch.Tensor, _timestep: float, latents: torch.Tensor, *, return_dict: bool) -> tuple[torch.Tensor]:
        """The latents as they are."""
        del noise, return_dict
        return (latents,)


def kinds_of(plan: Sequence[Step]) -> dict[str, Step]:
    """Name of each kind of step -> the first of it."""
    kinds: dict[str, Step] = {}
    for step in plan:
        kinds.setdefault(kind_of(step), step)
    return kinds


def kind_of(step: Step) -> str:
    """What of a step decides the work it makes."""
    if step.source is not None:
        return f"{step.expert} again{'' if step.guided else ' unguided'}"
    return f"{step.expert} {step.attention} {step.gemm}{'' if step.guided else ' unguided'}{' kept' if step.kept else ''}"


def _by_plan(stages: dict[str, Counts], plan: Sequence[Step]) -> dict[str, Counts]:
    """Each kind of step as often as the plan has it."""
    often = Counter(kind_of(step) for step in plan)
    return {name: counts.times(often.get(name, 1)) for name, counts in stages.items() if name != IGNORED}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    # A fake model is made in its dtype: `.to` cannot swap fake parameters.
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
