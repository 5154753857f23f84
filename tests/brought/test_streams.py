"""Prompts and recipes from a process substitution or standard input, by our launcher and by torchrun, on one and two ranks."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROMPTS = ["a red circle", "a blue square"]
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node {ranks} -m"


def shell(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in bash, as a user types it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False)


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.job
@pytest.mark.parametrize(
    ("how", "launcher", "ranks"),
    [
        ("substitution", "ours", 2),
        slow("stdin", "torchrun", 2),
        slow("substitution", "torchrun", 2),
        slow("stdin", "ours", 2),
        slow("substitution", "ours", 1),
        slow("stdin", "ours", 1),
        slow("substitution", "torchrun", 1),
        slow("stdin", "torchrun", 1),
    ],
)
def test_prompts_that_can_be_read_once(how: str, launcher: str, ranks: int, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "videos"
    start = "-m" if launcher == "ours" else TORCHRUN.format(ranks=ranks)
    words = [
        "--set=workload.steps=2",
        "--size=32x32",
        "--frames=5",
        f"--model={model}",
        f"--set=mesh.ranks={ranks}",
        "-o",
        str(out),
    ]
    command = f"{shlex.quote(sys.executable)} {start} wan_mlperf.generate {shlex.join(words)}"
    lines = "\\n".join(PROMPTS)
    piped = f"printf '{lines}' | {command} --prompts -" if how == "stdin" else f"{command} --prompts <(printf '{lines}')"
    done = shell(piped)
    assert done.returncode == 0, done.stderr[-2000:]
    videos = json.loads((out / "manifest.json").read_text())["videos"]
    assert [videos[f"{number}.mp4"]["prompt"] for number in range(2)] == PROMPTS
    assert f"{out}: 2 made" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ours", "torchrun"])
def test_a_recipe_that_can_be_read_once(launcher: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "video.mp4"
    start = "-m" if launcher == "ours" else TORCHRUN.format(ranks=2)
    words = ["a red circle", "--size=32x32", "--frames=5", f"--model={model}", "--set=mesh.ranks=2", "-o", str(out)]
    recipe = "<(sed 's/steps: 20/steps: 2/' configs/tiny.yaml)"
    done = shell(f"{shlex.quote(sys.executable)} {start} wan_mlperf.generate {shlex.join(words)} --recipe {recipe}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert out.is_file() and "denoising: 2/2" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ours", "torchrun"])
def test_a_search_whose_recipe_can_be_read_once(launcher: str, model: Path, tmp_path: Path) -> None:
    """And a wrong one is one line, on two ranks, too."""
    start = "-m" if launcher == "ours" else TORCHRUN.format(ranks=2)
    sizes = ["workload.height=32", "workload.width=32", "workload.frames=5", "mesh.ranks=2", "mesh.replicas=2", "mesh.cfg=1"]
    words = [*(f"--set={size}" for size in sizes), f"--model={model}", "--forwards=7", "--division=open", "--worst-edge=5"]
    words += ["--prompts=2", "--finalists=1", "-o", str(tmp_path / "out")]
    command = f"{shlex.quote(sys.executable)} {start} wan_mlperf.search {shlex.join(words)} --recipe"
    env = f"WAN_MLPERF_CACHE={shlex.quote(str(tmp_path / 'cache'))}"
    done = shell(f"{env} {command} <(sed 's/steps: 20/steps: 4/' configs/tiny.yaml)")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "recipe.yaml").is_file()
    done = shell(f"{env} {command} <(sed 's/trim_text: true/trimtext: true/' configs/tiny.yaml)")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]  # torchrun adds a traceback of its own
    assert len(lines) == 1 and "trimtext: no such key, did you mean 'trim_text'?" in lines[0], done.stderr[-2000:]
    assert done.returncode == (2 if launcher == "ours" else 1)
