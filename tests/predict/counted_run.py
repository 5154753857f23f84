"""Run on every rank by test_rehearsal.py: a real video on gloo, counted, and its peak memory as torch's own profiler sees it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

# In inference mode a dispatch mode sees a linear layer and not its product.
torch.inference_mode = torch.no_grad  # type: ignore[misc, assignment]

from wan_mlperf import Pipeline, load_recipe  # noqa: E402
from wan_mlperf.parallel import fake_ranks  # noqa: E402
from wan_mlperf.parallel import mesh as meshes  # noqa: E402
from wan_mlperf.predict.counting import Counted, Counting  # noqa: E402


def main() -> None:
    """Arguments: where the figures go, and the recipe's overrides."""
    folder, overrides = Path(sys.argv[1]), sys.argv[2:]
    groups: dict[str, Any] = {}
    counting, connect = Counting(groups), meshes.connect
    meshes.connect = lambda *args, **kwargs: Counted(connect(*args, **kwargs), counting)
    pipeline = Pipeline.load(load_recipe("tiny", overrides=overrides))
    groups.update(fake_ranks.groups_of(pipeline.mesh))
    parts = [pipeline.text_encoder.model, *pipeline.experts.values(), pipeline.decoder.vae]
    weights = sum(one.nbytes for part in parts for one in [*part.parameters(), *part.buffers()])
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        video(pipeline)
    live = highest = 0
    memory = [one for one in profile.kineto_results.events() if one.name() == "[memory]"]
    for event in sorted(memory, key=lambda one: one.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    with torch.no_grad(), counting.active(), counting("all"):
        video(pipeline)
    counts = counting.stages["all"]
    figures = {
        "calls": counts.calls,
        "flops": counts.flops,
        "sent": counts.sent,
        "messages": counts.messages,
        "weights": weights,
        "peak": weights + highest,
    }
    (folder / f"{pipeline.mesh.rank}.json").write_text(json.dumps(figures))


def video(pipeline: Pipeline) -> None:
    """One video, to its last chunk."""
    with torch.no_grad():
        for _ in pipeline.decoder.decode(pipeline.latents(["a red circle"])):
            pass


if __name__ == "__main__":
    main()
