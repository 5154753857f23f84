"""Whether the engine comes up on this host, which kernel each name of a recipe would take, and what a better one lacks.

As a program it asks (which imports torch, xDiT and whatever kernels are installed) and prints JSON. `ask` runs it as a separate
process, so that the host check itself imports none of them and survives a package that ends its process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter

from wan_mlperf import ranks
from wan_mlperf.kernels.features import Feature

TIMEOUT_S = 300  # AITER may build modules when it is imported


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Every name's kernel; `without`: names of the host's default recipe that nothing runs; `problem`: why asking failed.

    `device` is what a rank runs on, and why.
    """

    device: str = ""
    recipe: str = ""
    kernels: tuple[Feature, ...] = ()
    without: tuple[str, ...] = ()
    problem: str | None = None


def ask() -> Answer:
    """Ask in a separate process. A failure is returned as the answer's `problem`."""
    command = [sys.executable, "-m", __spec__.name]
    try:
        done = subprocess.run(
            command, env=ranks.environment_alone(), capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
        return TypeAdapter(Answer).validate_json(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return Answer(problem=said[-1] if said else type(error).__name__)


def answer() -> Answer:
    """Bring the engine up on one rank, and look at this host's packages."""
    from wan_mlperf.kernels.backends import CANDIDATES, GEMM_CANDIDATES
    from wan_mlperf.kernels.device import probe
    from wan_mlperf.parallel import mesh, survey
    from wan_mlperf.preflight import default_recipe
    from wan_mlperf.recipe import load_recipe
    from wan_mlperf.step_plan import make_plan

    mesh.start(mesh.Shape(replicas=1, cfg=1, ulysses=1, ring=1), probe()).close()
    recipe = load_recipe(default_recipe("singlestream"))
    features = survey.here([*CANDIDATES, *GEMM_CANDIDATES], recipe, probe())
    wanted = survey.names_of(recipe, make_plan(recipe, recipe.effective_workload))
    without = tuple(one.name for one in features if not one.runs and one.name in wanted)
    return Answer(device=str(probe()), recipe=recipe.name, kernels=tuple(features), without=without)


if __name__ == "__main__":
    print(json.dumps(asdict(answer())))
