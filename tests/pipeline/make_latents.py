"""Run on every rank by test_equal.py: for each case, the latents and frames of one prompt, saved by the first rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from wan_mlperf import Pipeline, load_recipe
from wan_mlperf.pipeline import Query


def main() -> None:
    """Arguments: the output folder, and cases as JSON: name -> [overrides, exact, prompt, seed]."""
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    for name, (overrides, exact, prompt, seed) in cases.items():
        pipeline = Pipeline.load(load_recipe("tiny", overrides=overrides, exact=exact))
        latents = pipeline.latents([Query(prompt, seed)])
        frames = pipeline.generate(prompt, seed=seed)
        if pipeline.mesh.is_replica_first:
            assert frames is not None
            torch.save({"latents": latents, "frames": torch.from_numpy(frames)}, folder / f"{name}.pt")


if __name__ == "__main__":
    main()
