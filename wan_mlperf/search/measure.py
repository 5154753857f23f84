"""Runs schedules on the recipe's own model, for fixed prompts and seeds. Results are kept and not measured again.

Every rank runs this. Several replicas share the trials. Each result is a separate file, so a search can be stopped at any moment
and continued.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wan_mlperf import cli
from wan_mlperf.checkpoint import Checkpoint
from wan_mlperf.files import atomic_file, atomic_write, cache_folder, writable_folder
from wan_mlperf.parallel.mesh import send_to_all
from wan_mlperf.pipeline import Pipeline
from wan_mlperf.preflight import Setup, prepare
from wan_mlperf.recipe import GemmName, Recipe
from wan_mlperf.replicas.watch import Watch
from wan_mlperf.search.choices import Schedule, exact
from wan_mlperf.step_plan import Step, make_plan

SKETCH = 16_384  # numbers of a prompt's difference that are kept


@dataclass(frozen=True, kw_only=True)
class Made:
    """A schedule's videos: latents in fp32 [prompts, channels, F, h, w], frames uint8 [prompts, F, height, width, 3]."""

    latents: torch.Tensor
    frames: np.ndarray | None


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

    def pipeline(self, formats: tuple[GemmName, GemmName]) -> Pipeline:
        """Return the pipeline with these formats. Another one is released first, as two large models do not fit."""
        if self._pipeline is None or self._formats != formats:
            self._pipeline = None
            gc.collect()
            self._pipeline = Pipeline.load(self._setup(formats), timeout_s=24 * 3600.0)
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
            made = pipeline.latents(self._prompts[start : start + self._batch])
            latents.append(made.float().cpu())
            if frames:
                chunks = list(pipeline.decode(made))
                videos += [np.concatenate(chunks, axis=1)] if chunks else []
        self._watch.idle()
        if not pipeline.mesh.is_replica_first:
            return None
        return Made(latents=torch.cat(latents), frames=np.concatenate(videos) if videos else None)

    def plan(self, schedule: Schedule) -> tuple[Step, ...]:
        """Return a schedule's plan for this model."""
        assert self._pipeline is not None
        config = self._pipeline.checkpoint.config("scheduler")
        return make_plan(schedule.in_recipe(self._recipe), self._recipe.effective_workload, config)

    def close(self) -> None:
        """Let the ranks go."""
        if self._pipeline is not None:
            self._pipeline.mesh.close()


class Ledger:
    """What each trial did to the final latents: one file per trial, in a folder named by the identity."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = writable_folder(cache_folder() / "search" / key, what="cache folder")
        if not (self.folder / "identity.json").exists():
            atomic_write(self.folder / "identity.json", json.dumps(identity, indent=1))

    def has(self, trial: str) -> bool:
        """True if it has been measured."""
        return self._file(trial).is_file()

    def read(self, trial: str) -> np.ndarray:
        """Return the difference to the exact latents, relative to their norm: fp32 [prompts x numbers]."""
        vector: np.ndarray = np.load(self._file(trial))
        return vector

    def add(self, trial: str, vector: np.ndarray) -> None:
        """Keep a result. When this returns, it is on disk."""
        with atomic_file(self._file(trial)) as file, file.open("wb") as stream:
            np.save(stream, vector)

    def _file(self, trial: str) -> Path:
        return self.folder / f"{trial.replace(' ', '_')}.npy"


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
