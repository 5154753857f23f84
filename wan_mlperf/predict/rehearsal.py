"""Rehearses a video: the pipeline's own code at its full size on fake tensors, as one rank after another of a fake group.

Nothing is computed and no weights are read. Stand-ins record attention and quantised linear layers as the kernels that the tables
choose for the hardware; all else runs: embeddings, blocks, exchange, guidance, the sharded decode. Each kind of step runs once
and is multiplied by the plan; each kind of rank runs (the first of each branch of guidance, edge and middle bands of the decode).

Not seen: what a compiler fuses (bytes are eager's), the scheduler's few operations on the latents, workspaces inside a kernel.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import UMT5EncoderModel

from wan_mlperf.denoise import Prompt, denoise
from wan_mlperf.experts import Expert, TextKeys
from wan_mlperf.parallel import fake_ranks, xdit
from wan_mlperf.parallel.mesh import Mesh, Shape
from wan_mlperf.predict.counting import IGNORED, Counted, Counting, Counts
from wan_mlperf.predict.subject import DTYPES, Subject, make_decoder, make_experts, make_text_model
from wan_mlperf.spans import Spans
from wan_mlperf.step_plan import Layers, Step, any_unguided
from wan_mlperf.text_encoder import MAX_TOKENS, Embeds

CPU = torch.device("cpu")


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
    """Rehearse every kind of rank, in separate processes if `workers` > 1 or this process has a process group."""
    duties = ranks_of(subject.shape)
    ranks = _run([(subject, rank, denoises) for rank, denoises in duties.items()], workers)
    return [ranks[0], *(_holding_all(rank, ranks[0]) for rank in ranks[1:])]


def rehearse_decodes(subjects: Sequence[Subject], *, workers: int = 1) -> list[RankCounts]:
    """Rehearse the first rank's decode alone of each subject: its only weights are the VAE's."""
    return _run([(subject, 0, False) for subject in subjects], workers)


def one_block(subject: Subject) -> dict[str, Counts]:
    """Kind of step -> what one forward does in one block on the first rank: two rehearsals whose experts differ by a block."""
    jobs = []
    for layers in (1, 2):
        parts = {name: {**subject.configs[name], "num_layers": layers} for name in ("transformer", "transformer_2")}
        once = tuple(replace(step, index=number, source=None) for number, step in enumerate(kinds_of(subject.plan).values()))
        parts["text_encoder"] = {**subject.configs["text_encoder"], "num_layers": 1}
        jobs.append((replace(subject, configs={**subject.configs, **parts}, plan=once), 0, True, False))
    fewer, more = (rank.stages for rank in _run(jobs, 1))
    forwards = {name: 2 // subject.shape.cfg if step.guided else 1 for name, step in kinds_of(subject.plan).items()}
    return {name: (more[name] - fewer[name]).times(1 / forwards[name]) for name in forwards if name in more}


def cores() -> int:
    """How many processes can rehearse side by side."""
    return len(os.sched_getaffinity(0))


def ranks_of(shape: Shape) -> dict[int, bool]:
    """Rank -> whether it denoises here, as the first of a branch; the others are the edge and middle bands of the decode."""
    size = shape.per_replica
    firsts = range(0, size, size // shape.cfg)
    return {rank: rank in firsts for rank in sorted({*firsts, 0, min(1, size - 1), size - 1})}


def _run(jobs: Sequence[tuple[Any, ...]], workers: int) -> list[RankCounts]:
    xdit.load()
    if workers == 1 and not fake_ranks.has_group():
        return [rehearse_rank(*job) for job in jobs]
    # A fork is seconds faster, but it would inherit the process group, and a process cannot have a fake one besides.
    context = multiprocessing.get_context("spawn" if fake_ranks.has_group() else "fork")
    before = set(multiprocessing.active_children())  # of a program that calls this
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_begin_worker) as pool:
        try:
            return list(pool.map(rehearse_rank, *zip(*jobs, strict=True)))
        except BaseException:  # stopped: a rank takes many seconds, and nobody waits for its counts
            for worker in set(multiprocessing.active_children()) - before:
                worker.kill()
            raise


def _begin_worker() -> None:
    """In a worker: how it ends is its parent's affair, which gets the same Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    xdit.load()


def rehearse_rank(subject: Subject, rank: int, denoises: bool, decodes: bool = True) -> RankCounts:
    """Rehearse one rank. Without `denoises` only its decode, with no weights but the VAE's; without `decodes` all but that."""
    torch.set_num_threads(1)
    here = replace(subject.device, torch=CPU)
    unguided = any_unguided(subject.plan)
    with fake_ranks.fake_mesh(subject.shape, here, rank, unguided=unguided) as mesh, FakeTensorMode(), torch.no_grad():
        counting = Counting(fake_ranks.groups_of(mesh))
        if mesh.exchange is not None:
            mesh.exchange = Counted(mesh.exchange, counting)
        parts: dict[str, Any] = {}
        if denoises:
            parts = {"text_encoder": make_text_model(subject), **make_experts(subject, mesh, counting)}
        decoder = make_decoder(subject, mesh) if decodes else None
        if decoder is not None:
            parts["vae"] = decoder.vae
        held = {name: [*part.parameters(), *part.buffers()] for name, part in parts.items()}
        weights = {name: float(sum(one.nbytes for one in tensors)) for name, tensors in held.items()}
        with counting.active():
            counting.hold([one for tensors in held.values() for one in tensors])
            latents = torch.empty(1, *subject.workload.latent_shape(subject.configs["vae"]["z_dim"]))
            if denoises:
                prompt = _encode(subject, mesh, parts["text_encoder"], counting)
                experts = {name: parts[name] for name in ("high_noise", "low_noise")}
                _denoise(subject, mesh, latents, prompt, experts, counting)
            with counting("vae_decode"):
                for _ in () if decoder is None else decoder.decode(latents):
                    pass
    return RankCounts(rank=rank, stages=_by_plan(counting.stages, subject.plan), weights=weights)


def _holding_all(rank: RankCounts, first: RankCounts) -> RankCounts:
    """Add to a rank that only decoded here the weights that it holds besides the VAE in a run."""
    missing = {name: size for name, size in first.weights.items() if name not in rank.weights}
    stages = {name: replace(counts, peak=counts.peak + sum(missing.values())) for name, counts in rank.stages.items()}
    return replace(rank, weights={**missing, **rank.weights}, stages=stages)


def _encode(subject: Subject, mesh: Mesh, model: UMT5EncoderModel, counting: Counting) -> Prompt:
    """Run the text encoder on the branches that this rank computes. No tokenizer runs: the lengths are typical ones."""
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
    """Run the loop over one step of each kind, each counted as a separate stage; text keys once per expert, as in a query."""
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
    """Make what the first video makes once and keeps: tables that depend on shapes and the schedule."""
    for step in steps:
        expert._modulation_of(step.timestep, latents)
        expert._rotary_of(latents, expert.split if step.guided else expert.unguided_split)


class _CountedExpert:
    """An expert whose text keys are made once for each set of formats, and counted as a separate stage."""

    def __init__(self, expert: Expert, name: str, counting: Counting) -> None:
        self._expert, self._name, self._counting = expert, name, counting
        self._keys: dict[tuple[Layers, int], list[TextKeys]] = {}
        self._layers: Layers = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._expert, name)

    def text_keys(self, embeds: Embeds) -> list[TextKeys]:
        """See `Expert.text_keys`."""
        key = self._layers, id(embeds)
        if key not in self._keys:
            with self._counting(f"text_keys {self._name}"):
                self._keys[key] = self._expert.text_keys(embeds)
        return self._keys[key]

    def select(self, layers: Layers) -> None:
        """See `Expert.select`."""
        self._layers = layers
        self._expert.select(layers)


class _NoScheduler:
    """Replaces UniPC, which reads values: its operations on the latents, about 5 MB, are not seen."""

    def __init__(self, steps: int) -> None:
        self.timesteps = [0.0] * steps

    def step(self, noise: torch.Tensor, _timestep: float, latents: torch.Tensor, *, return_dict: bool) -> tuple[torch.Tensor]:
        """Return the latents as they are."""
        del noise, return_dict
        return (latents,)


def kinds_of(plan: Sequence[Step]) -> dict[str, Step]:
    """Name of each kind of step -> the first of it."""
    kinds: dict[str, Step] = {}
    for step in plan:
        kinds.setdefault(kind_of(step), step)
    return kinds


def kind_of(step: Step) -> str:
    """Name what decides the work of a step."""
    if step.source is not None:
        return f"{step.expert} again{'' if step.guided else ' unguided'}"
    formats = ",".join([step.gemm, *(f"{pattern}={form}" for pattern, form in step.layers)])
    return f"{step.expert} {step.attention} {formats}{'' if step.guided else ' unguided'}{' kept' if step.kept else ''}"


def _by_plan(stages: dict[str, Counts], plan: Sequence[Step]) -> dict[str, Counts]:
    """Multiply each kind of step by how often the plan has it."""
    often = Counter(kind_of(step) for step in plan)
    return {name: counts.times(often.get(name, 1)) for name, counts in stages.items() if name != IGNORED}
