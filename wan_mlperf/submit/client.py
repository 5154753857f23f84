"""MLCommons' endpoints client, which the user installs: where it is, the rows it sends, its configuration for this system.

Read and tried at commit ea332753 of mlcommons/endpoints (Python 3.12).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sut.prompts import benchmark_prompts
from sut.result import Scenario
from wan_mlperf.errors import BadInput
from wan_mlperf.files import atomic_write
from wan_mlperf.inputs.paths import is_folder
from wan_mlperf.recipe import CONFIGS
from wan_mlperf.workload import DIMENSIONS, MLPERF, Workload

PROGRAM = "inference-endpoint"
COMMIT = "ea332753"
INSTALL = (
    "a Python 3.12 environment with it, made by `python3.12 -m venv client && client/bin/pip install "
    f"git+https://github.com/mlcommons/endpoints@{COMMIT}`"
)
# What a dry run asks for instead of the configuration's numbers: distinct samples of the performance run, and of each half of
# the audit.
DRY_SAMPLES, DRY_AUDIT, DRY_WARMUP = 24, 16, 2
SCORER = "scorer"
ACCURACY = "wan22_vbench"  # the accuracy data set's name in the configurations
# The client has its VBench scored by `uv run --project FOLDER python FOLDER/vbench_runner.py`. This stands in for uv: it leaves
# the score open ("nan", as JSON has no NaN), because the server still holds the GPUs; the campaign's VBench stage fills it in.
SCORED_LATER = f"""#!/usr/bin/env python3
import json, pathlib, sys
given = dict(zip(sys.argv, sys.argv[1:]))
file = pathlib.Path(given["--out-dir"]) / (given["--name"] + "_eval_results.json")
file.write_text(json.dumps({{name: ["nan", []] for name in {list(DIMENSIONS)!r}}}))
print("not scored yet: the campaign's VBench stage does it when the server has left the GPUs")
"""


def find(client: str | None) -> Path:
    """Return the client's program. `client` is its Python, its environment's folder, or the program itself. Raises BadInput."""
    if client is None:
        raise BadInput(f"--harness endpoints needs MLCommons' client; allowed: --client with {INSTALL}")
    place = Path(client)
    inside = (place / "bin", place) if is_folder(place, what="--client") else (place.parent,)
    for folder in inside:
        program = (folder / PROGRAM).absolute()  # links are kept: the environment is next to the link, not its target
        if program.is_file() and os.access(program, os.X_OK):
            return program
    raise BadInput(f"--client {client!r}: no {PROGRAM} there; allowed: {INSTALL}")


def check(program: Path, config: Path) -> None:
    """Have the client itself read a configuration. Raises BadInput if it refuses it, as another version may."""
    words = [str(program), "validate-yaml", "--config", str(config)]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        last = lines[-1][:300] if lines else f"exit code {done.returncode}"
        raise BadInput(f"--client {str(program)!r}: refuses its configuration ({last}); allowed: commit {COMMIT} of it")


def write_rows(file: Path, prompts: Sequence[str], workload: Workload) -> None:
    """Write the client's data set. Its own `wan22_prompts.jsonl` has the same rows for the benchmark's workload.

    Rows for another workload also hold its size, length, steps and guidance: the client would send the benchmark's.
    """
    own: dict[str, object] = {}
    if workload != MLPERF:
        own = {
            "size": f"{workload.height}x{workload.width}",  # rows x columns, as the client means it
            "seconds": workload.frames / workload.fps,
            "fps": workload.fps,
            "num_inference_steps": workload.steps,
            "guidance_scale": workload.guidance_high,
            "guidance_scale_2": workload.guidance_low,
            "seed": workload.seed,
            "num_frames": workload.frames,
            "boundary_ratio": workload.boundary_ratio,
        }
    rows = [{"prompt": prompt, "negative_prompt": workload.negative_prompt, **own} for prompt in prompts]
    atomic_write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def configuration(scenario: Scenario, *, rows: Path, run: Path, dry_run: bool) -> dict[str, Any]:
    """Return the client's configuration of a scenario's run: configs/mlperf/endpoints-SCENARIO.yaml with this run's paths.

    It measures performance and makes the accuracy run's videos. The audit is a separate call (`audit_of`), so that it can be
    repeated alone. The server's address comes later (`at`).
    """
    shipped = CONFIGS / "mlperf" / f"endpoints-{scenario}.yaml"
    config: dict[str, Any] = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    for data_set in config["datasets"]:
        data_set["path"] = str(rows)
        if data_set["name"] == ACCURACY:
            place = run / SCORER
            data_set["accuracy_config"]["extras"] = {"vbench_project_path": str(place), "uv_executable": str(place / "uv")}
    config["report_dir"] = str(run)
    if dry_run:
        config["settings"]["runtime"]["n_samples_to_issue"] = DRY_SAMPLES
        config["settings"]["warmup"]["n_requests"] = DRY_WARMUP
        config["audit"].update(samples=DRY_AUDIT, audit_samples=DRY_AUDIT)
    return config


def write_scorer(run: Path) -> None:
    """Write what the client calls to have its videos scored."""
    folder = run / SCORER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vbench_runner.py").write_text("# The client looks for this file; uv beside it is what it calls.\n")
    (folder / "uv").write_text(SCORED_LATER)
    (folder / "uv").chmod(0o755)


def main_of(config: dict[str, Any], address: str) -> dict[str, Any]:
    """The configuration of the performance and accuracy run."""
    return {**{key: value for key, value in config.items() if key != "audit"}, **_at(config, address)}


def audit_of(config: dict[str, Any], address: str) -> dict[str, Any]:
    """The configuration of the audit alone."""
    performance = [one for one in config["datasets"] if one["type"] == "performance"]
    return {**config, "datasets": performance, "audit": {**config["audit"], "only": True}, **_at(config, address)}


def _at(config: dict[str, Any], address: str) -> dict[str, Any]:
    return {"endpoint_config": {**config["endpoint_config"], "endpoints": [address]}}


def samples(config: dict[str, Any], prompts: int) -> dict[str, int]:
    """How many videos each part of a run makes: warm-up, performance, accuracy, audit (including its own warm-ups)."""
    settings, audit = config["settings"], config["audit"]
    warm_up = settings["warmup"]["n_requests"]
    return {
        "warm-up": warm_up,
        "performance": settings["runtime"]["n_samples_to_issue"],
        "accuracy": prompts,
        "audit": audit["samples"] + audit["audit_samples"] + 2 * warm_up,
    }


def expected(scenario: Scenario, kind: str, *, dry_run: bool) -> int:
    """How many videos a stage of a campaign makes."""
    config = configuration(scenario, rows=Path(), run=Path(), dry_run=dry_run)
    planned = samples(config, len(benchmark_prompts()))
    return planned["audit"] if kind == "test04" else sum(planned.values())
