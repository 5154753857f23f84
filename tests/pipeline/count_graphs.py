"""Run on every rank by test_compile.py: graphs compiled in the warm-up, and after prompts of several lengths."""

from __future__ import annotations

import json
import sys

from torch._dynamo.utils import counters

from wan_mlperf import Pipeline, load_recipe

PROMPTS = ("a red circle", "a blue square that moves to the left " * 3, "many small green triangles " * 15)


def main() -> None:
    """Arguments: overrides of recipe tiny. Prints a list of numbers on the first rank."""
    pipeline = Pipeline.load(load_recipe("tiny", overrides=sys.argv[1:]))
    pipeline.warm_up(1)
    graphs = [counters["stats"]["unique_graphs"]]
    for prompt in PROMPTS:
        pipeline.generate(prompt)
        graphs.append(counters["stats"]["unique_graphs"])
    if pipeline.mesh.rank == 0:
        print("graphs", json.dumps(graphs))
    pipeline.mesh.close()


if __name__ == "__main__":
    main()
