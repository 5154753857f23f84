"""Run on every rank by tests of pipelines: for each case, the latents of its prompts and the first frames, saved by rank 0."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wan_mlperf import Pipeline, load_recipe
from wan_mlperf.pipeline import Query

Cases = Mapping[str, tuple[Sequence[str], bool, str | Sequence[str], int]]  # name -> overrides, exact, prompt or several, seed


def main(folder: Path, cases: Cases) -> None:
    """Make each case and save it in `folder`, under its name."""
    pipeline, loaded = None, None
    kept: list[torch.Tensor] = []

    def keep(_step: Any, latents: torch.Tensor) -> None:
        kept[:] = [latents]

    for name, (overrides, exact, prompt, seed) in cases.items():
        if pipeline is None or loaded != (overrides, exact):
            pipeline, loaded = Pipeline.load(load_recipe("tiny", overrides=overrides, exact=exact)), (overrides, exact)
        queries = [Query(one, seed) for one in ([prompt] if isinstance(prompt, str) else prompt)]
        chunks = [chunk[0] for chunk in pipeline.stream_batch(queries, on_step=keep)]
        if pipeline.mesh.is_replica_first:
            frames = torch.from_numpy(np.concatenate(chunks))
            torch.save({"latents": kept[0].clone(), "frames": frames}, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
