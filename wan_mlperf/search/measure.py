"""Runs schedules on the recipe's own model, for fixed prompts and seeds. Results are kept and not measured again.

A schedule starts where it first differs from the exact one, whose latents before each step are kept: that saves half of a
trial on average.

Every rank runs this. Several replicas share the trials. Each result is a separate file, so a search can be stopped at any moment
and continued.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wan_mlperf import cli
from wan_mlperf.checkpoint import Checkpoint
from wan_mlperf.denoise import Start
from wan_mlperf.files import atomic_file, atomic_write, cache_folder, writable_folder
from wan_mlperf.parallel.mesh import send_to_all
from wan_mlperf.pipeline import Pipeline
from wan_mlperf.preflight import Setup, prepare
from wan_mlperf.recipe import GemmName, Recipe
from wan_mlperf.replicas.watch import Watch
from wan_mlperf.search.choices import Schedule, exact
from wan_mlperf.step_plan import Step, make_plan
from wan_mlperf.text_encoder import Embeds, TextEncoder

SKETCH = 16_384  # numbers of a prompt's difference that are kept
HOST = torch.device("cpu")
SAMPLE_DIMS = 5  # [prompts, channels, F, h, w]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A schedule's videos: latents in fp32 [prompts, channels, F, h, w], frames uint8 [prompts, F, height, width, 3]."""

    latents: torch.Tensor
    frames: np.ndarray | None


class _Remembering(TextEncoder):
    """A text encoder that encodes the same prompts only once: every trial uses them."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__(encoder.tokenizer, encoder.model, encoder.dtype)
        self._embeds: dict[tuple[str, ...], Embeds] = {}

    def encode(self, prompts: Sequence[str]) -> Embeds:
        """See `TextEncoder.encode`."""
        key = tuple(prompts)
        if key not in self._embeds:
            self._embeds[key] = super().encode(prompts)
        return self._embeds[key]


class Bench:
    """A recipe's model, loaded once per pair of GEMM formats, which can run any schedule."""

    def __init__(
        self,
        recipe: Recipe,
        prompts: Sequence[str],
        watch: Watch,
        *,
        kernels: Sequence[str],
        batch: int,
        verified: Checkpoint | None = None,
    ) -> None:
        self._recipe, self._prompts, self._watch, self._batch, self._verified = recipe, list(prompts), watch, batch, verified
        self._kernels = kernels
        self._formats: tuple[GemmName, GemmName] | None = None
        self._pipeline: Pipeline | None = None
        self._starts: dict[int, list[Start]] = {}  # first prompt of a batch -> the exact run's, before each step and at the end
        self._exact: Sequence[Step] = ()

    def pipeline(self, formats: tuple[GemmName, GemmName]) -> Pipeline:
        """Return the pipeline with these formats. Another one is released first, because two large models do not fit."""
        if self._pipeline is None or self._formats != formats:
            self._pipeline = None
            gc.collect()
            self._pipeline = Pipeline.load(self._setup(formats), timeout_s=24 * 3600.0)
            self._pipeline.text_encoder = _Remembering(self._pipeline.text_encoder)
            self._formats = formats
            self._watch.follow(self._pipeline.spans)
        return self._pipeline

    def _setup(self, formats: tuple[GemmName, GemmName]) -> Setup:
        """Return a setup whose plan names every kernel and has a step without guidance, so that it loads all that is needed."""
        steps = self._recipe.effective_workload.steps
        names = tuple(self._kernels[index % len(self._kernels)] for index in range(max(steps, len(self._kernels))))[:steps]
        everything = Schedule(attention=names, high_noise=formats[0], low_noise=formats[1], off=(steps - 1,))  # type: ignore[arg-type]
        return prepare(everything.in_recipe(self._recipe), verified=self._verified)

    def run(self, schedule: Schedule, *, name: str, frames: bool = False) -> Made | None:
        """Make the videos of a schedule. Returns them on the replica's first rank, and None elsewhere."""
        pipeline = self.pipeline(schedule.formats())
        pipeline.plan = self.plan(schedule)
        self._watch.begin(name)
        latents: list[torch.Tensor] = []
        videos: list[np.ndarray] = []
        for start in range(0, len(self._prompts), self._batch):
            made = self._latents(pipeline, start, schedule == exact(len(pipeline.plan)))
            latents.append(made.float().cpu())
            if frames:
                chunks = list(pipeline.decode(made))
                videos += [np.concatenate(chunks, axis=1)] if chunks else []
        self._watch.idle()
        if not pipeline.mesh.is_replica_first:
            return None
        return Made(latents=torch.cat(latents), frames=np.concatenate(videos) if videos else None)

    def _latents(self, pipeline: Pipeline, first: int, is_exact: bool) -> torch.Tensor:
        """Denoise one batch of prompts, from where its plan first differs from the exact schedule's."""
        prompts, starts, device = self._prompts[first : first + self._batch], self._starts.get(first), pipeline.mesh.device.torch
        if starts is not None:
            begin = starts[self._shared(pipeline.plan)]
            return pipeline.latents(prompts, start=_on(begin, device))
        begin = pipeline.start(prompts)
        if not is_exact:
            return pipeline.latents(prompts, start=begin)
        starts = [_on(begin, HOST)]

        def keep(step: Step, latents: torch.Tensor) -> None:
            starts.append(_on(Start(step.index + 1, latents, begin.scheduler), HOST))

        made = pipeline.latents(prompts, start=begin, on_step=keep)
        self._starts[first], self._exact = starts, pipeline.plan
        return made

    def _shared(self, plan: Sequence[Step]) -> int:
        """Return how many first steps a plan shares with the exact one and does not apply again later."""
        alike = (replace(one, kept=False) == replace(other, kept=False) for one, other in zip(plan, self._exact, strict=True))
        shared = next((index for index, same in enumerate(alike) if not same), len(plan))
        return min([shared, *(step.source for step in plan if step.source is not None)])

    def plan(self, schedule: Schedule) -> tuple[Step, ...]:
        """Return a schedule's plan for this model."""
        assert self._pipeline is not None
        config = self._pipeline.checkpoint.config("scheduler")
        return make_plan(schedule.in_recipe(self._recipe), self._recipe.effective_workload, config)

    def close(self) -> None:
        """Close the process groups."""
        if self._pipeline is not None:
            self._pipeline.mesh.close()


class Ledger:
    """What each trial did to the final latents: one file per trial, in a folder named by a hash of the identity."""

    def __init__(self, identity: Mapping[str, object]) -> None:
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = writable_folder(cache_folder() / "search" / key, what="cache folder")
        if not (self.folder / "identity.json").exists():
            atomic_write(self.folder / "identity.json", json.dumps(identity, indent=1))

    def has(self, trial: str) -> bool:
        """True if it has been measured."""
        return self._file(trial).is_file()

    def read(self, trial: str) -> np.ndarray:
        """Return the difference from the exact latents, relative to their norm: fp32 [prompts x numbers]."""
        vector: np.ndarray = np.load(self._file(trial))
        return vector

    def add(self, trial: str, vector: np.ndarray) -> None:
        """Keep a result. When this returns, it is on disk."""
        with atomic_file(self._file(trial)) as file, file.open("wb") as stream:
            np.save(stream, vector)

    def _file(self, trial: str) -> Path:
        return self.folder / f"{trial.replace(' ', '_')}.npy"


def _on(start: Start, device: torch.device) -> Start:
    """Return a copy of a start whose samples are on a device: the latents, and what the scheduler remembers of earlier steps."""
    scheduler = copy.copy(start.scheduler)
    for name, value in vars(scheduler).items():
        setattr(scheduler, name, _samples_on(value, device))
    return Start(start.step, start.latents.to(device), scheduler)


def _samples_on(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_samples_on(one, device) for one in value]
    return value.to(device) if isinstance(value, torch.Tensor) and value.ndim == SAMPLE_DIMS else value


def difference(made: torch.Tensor, reference: torch.Tensor) -> np.ndarray:
    """Return how far latents [prompts, ...] are from the exact ones: each prompt relative to its norm, concatenated.

    The squared length is the mean squared relative error. A long difference is folded to SKETCH numbers per prompt with random
    signs (a count sketch), which keeps lengths and angles to within a few percent: latents of 720p have 4.8 million numbers.
    """
    exact = reference.flatten(1)
    relative = (made.flatten(1) - exact) / exact.norm(dim=1, keepdim=True) / len(exact) ** 0.5
    if relative.shape[1] > SKETCH:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (relative.shape[1],), generator=generator).to(relative.dtype) * 2 - 1
        places = torch.randint(0, SKETCH, (relative.shape[1],), generator=generator)
        relative = torch.zeros(len(relative), SKETCH).index_add_(1, places, relative * signs)
    return relative.flatten().numpy()


def measure(bench: Bench, trials: Mapping[str, Schedule], ledger: Ledger, *, steps: int) -> None:
    """On every rank: run this replica's share of the trials that the ledger lacks.

    All ranks load together, so all replicas finish a pair of GEMM formats before the next one.
    """
    mesh = bench.pipeline(exact(steps).formats()).mesh
    known = json.loads(send_to_all(json.dumps([name for name in trials if ledger.has(name)])))
    missing = {name: schedule for name, schedule in trials.items() if name not in known}
    if not missing:
        return
    whole = bench.run(exact(steps), name="exact")
    progress = cli.Progress("trials", len(missing))
    for formats in dict.fromkeys(schedule.formats() for schedule in missing.values()):
        bench.pipeline(formats)
        names = [name for name, schedule in missing.items() if schedule.formats() == formats]
        for number, name in enumerate(names):
            if number % mesh.shape.replicas == mesh.replica:
                made = bench.run(missing[name], name=name)
                if made is not None and whole is not None:
                    ledger.add(name, difference(made.latents, whole.latents))
            progress.advance()
        bench.pipeline(formats).mesh.barrier()
    progress.close()
