"""However a command ends, nothing of ours is left outside its output, its run folder and the cache.

Each is ended in the middle of its work, at a moment when it has something temporary, on a file system where that has a name.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests import run_folders
from tests.conftest import ROOT
from tests.leftovers.place import CACHE, HOOKS, Place, await_moment, end
from tests.replicas import jobs
from wan_mlperf import files
from wan_mlperf.files import TEMPORARY
from wan_mlperf.vbench import checkpoints as vbench_checkpoints
from wan_mlperf.vbench import environment as vbench_environment
from wan_mlperf.video import write_mp4

LONG = ("--set=workload.steps=400", "--set=workload.height=32", "--set=workload.width=32", "--set=workload.frames=5")
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "timeout", "impatient")
BY = {"timeout": "SIGTERM", "impatient": "SIGINT"}  # the signal that those ways send
KILLED = ("kill 0", "kill 1")


@dataclass(frozen=True, kw_only=True)
class Command:
    """How to start a command, what it may leave, and the moment at which it is ended.

    `words` gets the place and the model; `short` are more words with which it ends soon, `codes` its exit codes then.
    """

    words: Callable[[Place, Path], list[str]]
    moment: Callable[[Place, jobs.Job], bool]
    outputs: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    ways: tuple[str, ...] = SIGNALS
    codes: tuple[int, ...] = (0,)


def prompts(place: Place) -> str:
    (place.root / "prompts.txt").write_text("".join(f"a shape number {number}\n" for number in range(12)))
    return str(place.root / "prompts.txt")


def recipe(place: Path | Place, model: Path, replicas: int = 2) -> str:
    root = place.root if isinstance(place, Place) else place
    return str(jobs.write_recipe(root, model, replicas=replicas))


def temporary_in(folder: str) -> Callable[[Place, jobs.Job], bool]:
    return lambda place, _job: any((place.root / folder).rglob(f"{TEMPORARY}*"))


def exists(pattern: str) -> Callable[[Place, jobs.Job], bool]:
    return lambda place, _job: any(place.root.glob(pattern))


def says(text: str) -> Callable[[Place, jobs.Job], bool]:
    return lambda _place, job: text in job.output


def run_words(*more: str) -> Callable[[Place, Path], list[str]]:
    return lambda place, model: ["wan_mlperf.run", *jobs.offline(Path(recipe(place, model)), place.working / "outputs", *more)]


def vbench_words(place: Place, _model: Path) -> list[str]:
    """A worker that stands for VBench's: it keeps something in its temporary folder and does not end by itself.

    The real one needs an environment of 3 GB; how it is started and ended is what counts here.
    """
    environment = place.root / CACHE / "vbench"
    (environment / "bin").mkdir(parents=True)
    mark = {"requirements": vbench_environment._requirements(), "python": sysconfig.get_python_version()}
    (environment / "ready.json").write_text(json.dumps(mark))
    worker = environment / "bin" / "python"
    worker.write_text("#!/bin/sh\nmktemp -d\necho working >&2\nexec sleep 600\n")
    worker.chmod(0o755)
    info = vbench_environment.Environment(environment).full_info
    info.parent.mkdir(parents=True)
    info.write_text('[{"prompt_en": "alley", "dimension": ["background_consistency"]}]')
    for one in vbench_checkpoints.CHECKPOINTS:
        for name in one.inside or ("",):
            file = place.home / ".cache" / "vbench" / one.path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("stands for a checkpoint\n")
    videos = place.working / "videos"
    videos.mkdir()
    write_mp4(videos / "alley-0.mp4", [np.zeros((5, 32, 32, 3), np.uint8)], fps=8)
    return ["wan_mlperf.vbench", str(videos), "--dimensions", "background_consistency", "--device", "cpu"]


def report_words(place: Place, _model: Path) -> list[str]:
    folder = run_folders.write(place.working / "run", "singlestream", "performance")
    return ["wan_mlperf.report", str(folder)]


def never(_place: Place, _job: jobs.Job) -> bool:
    raise AssertionError("this one is over at once")


COMMANDS = {
    "generate": Command(
        words=lambda place, model: ["wan_mlperf.generate", "a circle", "--recipe", recipe(place, model, 1), "-o", "x.mp4", *LONG],
        moment=temporary_in("cwd"),
        outputs=("cwd/x.mp4",),
        short=("--steps", "2"),
        ways=(*SIGNALS, *KILLED, "launcher"),
    ),
    "generate on one rank": Command(
        words=lambda place, model: [
            *("wan_mlperf.generate", "a circle", "--recipe", recipe(place, model, 1), "-o", "x.mp4", *LONG),
            *("--set=mesh.ranks=1", "--set=mesh.replicas=1"),
        ],
        moment=temporary_in("cwd"),
        outputs=("cwd/x.mp4",),
        short=("--steps", "2"),
    ),
    "generate a list": Command(
        words=lambda place, model: [
            *("wan_mlperf.generate", "--prompts", prompts(place), "--recipe", recipe(place, model), "-o", "videos"),
            *("--set=workload.steps=20",),
        ],
        moment=exists("cwd/videos/0.mp4"),
        outputs=(r"cwd/videos/(\d+\.mp4|manifest.json|prompts.json)",),
        short=("--steps", "2"),
        ways=(*SIGNALS, *KILLED),
    ),
    "run": Command(
        words=run_words("--set=workload.steps=20"),
        moment=says("offline performance: 2/12"),
        outputs=("cwd/outputs/.*",),
        ways=(*SIGNALS, *KILLED),
    ),
    "run for accuracy": Command(
        words=run_words("--mode", "accuracy", "--set=workload.steps=20"),
        moment=exists("cwd/outputs/*/videos/*.mp4"),
        outputs=("cwd/outputs/.*",),
        ways=(*SIGNALS, *KILLED),
    ),
    "serve": Command(
        words=lambda place, model: ["wan_mlperf.serve", "--recipe", recipe(place, model), "--port", "0"],
        moment=says("ready at"),
        outputs=("cwd/served/", "cwd/served/manifest.json"),
        ways=(*SIGNALS, *KILLED),
    ),
    "vbench": Command(
        words=vbench_words,
        moment=lambda place, _job: any(place.temporary.glob("*vbench*/tmp.*")),
        outputs=("cwd/videos/.*", r"home/\.cache/vbench/.*"),
        short=("--parse-only",),
        codes=(1,),
    ),
    "report": Command(words=report_words, moment=never, outputs=("cwd/run/.*",), ways=()),
    "doctor": Command(words=lambda _place, _model: ["wan_mlperf.doctor"], moment=never, ways=(), codes=(0, 1)),
    "predict": Command(
        words=lambda _place, _model: [
            *("wan_mlperf.predict", "--recipe", "mi355x-singlestream", "--hardware", "mi355x", "--gpus", "8"),
            *("--json", "p.json"),
        ],
        moment=lambda _place, job: len(job.survivors()) > 1,  # the rehearsal has forked its workers
        outputs=("cwd/p.json",),
    ),
    "bench": Command(
        words=lambda _place, _model: ["wan_mlperf.bench", "speed", "--rounds", "40", "--json", "b.json"],
        moment=exists("tmp/wan_mlperf-bench-*/ours-cfg=auto.log"),
        outputs=("cwd/b.json",),
        short=("--rounds", "1"),
        ways=(*SIGNALS, *KILLED),
    ),
    "search": Command(
        words=lambda place, model: [
            *("wan_mlperf.search", "--recipe", recipe(place, model), "--division", "open", "--forwards", "8"),
            *("--prompts", "2", "--finalists", "1", "--set=workload.steps=6", "-o", "found"),
        ],
        moment=says("trials"),
        outputs=("cwd/found.*",),
        ways=(*SIGNALS, *KILLED),
    ),
    "submit": Command(
        words=lambda place, model: [
            *("wan_mlperf.submit", "run", "--dry-run", "--scenario", "offline", "--recipe", recipe(place, model)),
            *("--campaign", "campaign"),
        ],
        moment=exists("cwd/campaign/*/mlperf_log_*"),
        outputs=("cwd/campaign/.*",),
    ),
}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def started(name: str, place: Place, model: Path, *more: str) -> tuple[jobs.Job, tuple[str, ...]]:
    """Start a command. Returns also what may be there afterwards: what was there before, and its outputs."""
    words = COMMANDS[name].words(place, model)
    there = tuple(re.escape(one) for one in place.files())
    return place.start([*words, *more]), (*there, *COMMANDS[name].outputs)


def check_end(job: jobs.Job, way: str) -> None:
    code, _ = job.finish()
    if way in SIGNALS:
        assert code == 128 + signal.Signals[BY.get(way, way)] or (code == 0 and "stopping:" in job.output), job.output
    elif way != "launcher":
        assert code == 3, job.output
    assert "Traceback" not in job.output and "frame #" not in job.output, job.output


LASTING = [(name, way) for name, command in COMMANDS.items() for way in command.ways]
IN_MAKE_TEST = [("generate on one rank", "SIGTERM")]


@pytest.mark.job
@pytest.mark.parametrize(
    ("name", "way"), [pytest.param(*one, marks=() if one in IN_MAKE_TEST else pytest.mark.slow) for one in LASTING]
)
def test_ended_in_the_middle(name: str, way: str, place: Place, model: Path) -> None:
    job, outputs = started(name, place, model)
    try:
        await_moment(job, lambda: COMMANDS[name].moment(place, job))
        end(job, way)
        check_end(job, way)
    finally:
        job.kill()
    if (
        way == "kill 0"
    ):  # the holder of an output folder's lock was killed, and the system has let go of it: the next command takes it
        outputs = (*outputs, r"cwd/\w+/\.lock")
    assert place.left(*outputs) == [], job.output


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "serve"])
def test_done(name: str, place: Place, model: Path) -> None:
    job, outputs = started(name, place, model, *COMMANDS[name].short)
    code, _ = job.finish()
    assert code in COMMANDS[name].codes, job.output
    assert place.left(*outputs) == [], job.output


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_refused(name: str, place: Place, model: Path) -> None:
    words = COMMANDS[name].words(place, model)
    there = tuple(re.escape(one) for one in place.files())
    job = place.start([*words, "--nonsense"])
    assert job.finish()[0] == 2, job.output
    assert place.left(*there) == [], job.output


KILLED_HOLDER = """
import os, signal, sys
from pathlib import Path
from wan_mlperf import files
with files.scratch("part", inside=Path(sys.argv[1])) as folder, files.atomic_file(Path(sys.argv[1]) / "x.mp4") as file:
    (folder / "half").write_text("half")
    file.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_rank_leaves_goes_with_its_job(tmp_path: Path) -> None:
    """On a file system where every temporary file has a name. The launcher's part is called here as `launch` calls it."""
    outputs, job = tmp_path / "outputs", tmp_path / "job"
    outputs.mkdir()
    job.mkdir()
    env = {**os.environ, "PYTHONPATH": f"{HOOKS}:{ROOT}", files.JOB: str(job)}
    done = subprocess.run([sys.executable, "-c", KILLED_HOLDER, str(outputs)], env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(outputs.iterdir())) == 2 and all(one.name.startswith(TEMPORARY) for one in outputs.iterdir())
    files.clean_up_after(job)
    assert list(outputs.iterdir()) == []


def test_a_link_is_replaced_in_one_step(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    files.atomic_link(tmp_path / "latest", "old")
    files.atomic_link(tmp_path / "latest", "new")
    assert os.readlink(tmp_path / "latest") == "new" and {one.name for one in tmp_path.iterdir()} == {"old", "latest"}
