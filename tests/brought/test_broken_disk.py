"""Every command on a file system that fails at the n-th call: one line with the path and the reason, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import run_folders
from tests.brought.broken_disk import Runner
from tests.conftest import ROOT
from tests.submit.packing import PERSON, SCENARIOS, git
from wan_mlperf.files import TEMPORARY
from wan_mlperf.submit.campaign import Campaign
from wan_mlperf.video import read_mp4

ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.ESTALE, errno.EROFS, errno.EMFILE, errno.EDQUOT, errno.ENOMEM)
SMALL = ("--steps=2", "--size=32x32", "--frames=5", "--set=mesh.ranks=1")
WORKLOAD = tuple(f"--set=workload.{one}" for one in ("steps=2", "height=32", "width=32", "frames=5"))
REMOVALS = ("unlink", "remove", "rmdir", "close")  # if they fail, what they should have removed stays


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command, and what it leaves in a folder with a model, a list of prompts, two runs and VBench's raw results."""

    module: str
    arguments: Sequence[str]
    leaves: Sequence[str] = ()
    needs: Sequence[str] = ("model",)
    one_rank: bool = False  # as a rank of torchrun's
    env: dict[str, str] = field(default_factory=dict)


CASES = {
    "generate": Case(
        module="wan_mlperf.generate.__main__",
        arguments=["a red circle", "-o", "@out/x.mp4", "--model", "@model", *SMALL],
        leaves=["out/x.mp4"],
    ),
    "generate-list": Case(
        module="wan_mlperf.generate.__main__",
        arguments=["--prompts", "@prompts.txt", "-o", "@videos", "--model", "@model", *SMALL],
        leaves=["videos/0.mp4", "videos/1.mp4", "videos/manifest.json"],
    ),
    "run": Case(
        module="wan_mlperf.run",
        arguments=["--recipe", "@my.yaml", "--prompts", "@prompts.txt", "--outputs", "@outputs", "--model", "@model", *WORKLOAD],
        leaves=[f"outputs/latest/{one}" for one in ("result.json", "report.html", "recipe.yaml", "user.conf", "plan.txt")],
        one_rank=True,
    ),
    "accuracy": Case(
        module="wan_mlperf.run",
        arguments=[
            *("--recipe", "@my.yaml", "--prompts", "@prompts.txt", "--outputs", "@outputs", "--model", "@model"),
            *("--mode", "accuracy", *WORKLOAD),
        ],
        leaves=[
            f"outputs/latest/{one}" for one in ("result.json", "report.html", "prompts.json", "videos/0.mp4", "videos/1.mp4")
        ],
        one_rank=True,
    ),
    "report": Case(module="wan_mlperf.report.__main__", arguments=["@a"], leaves=["a/report.html"], needs=["a"]),
    "compare": Case(
        module="wan_mlperf.report.__main__", arguments=["@a", "@b", "-o", "@c.html"], leaves=["c.html"], needs=["a", "b"]
    ),
    "vbench": Case(
        module="wan_mlperf.vbench.__main__",
        arguments=["@scored", "--parse-only"],
        leaves=["scored/vbench/summary.json"],
        needs=["scored"],
    ),
    "doctor": Case(module="wan_mlperf.doctor.__main__", arguments=["--outputs", "@outputs", "--json"], needs=[]),
    "predict": Case(
        module="wan_mlperf.predict.__main__",
        arguments=["--recipe", "@my.yaml", "--hardware", "mi355x", "--quick", "--json", "@p.json", "--html", "@p.html"],
        leaves=["p.json", "p.html"],
        needs=[],
    ),
    "fit": Case(
        module="wan_mlperf.predict.__main__",
        arguments=["fit", "--json", "@f.json", "--write", "@w.json"],
        leaves=["f.json", "w.json"],
        needs=[],
    ),
    "system": Case(
        module="wan_mlperf.submit.__main__",
        arguments=["system", "@campaign", "-o", "@s.json"],
        leaves=["s.json"],
        needs=["campaign"],
    ),
    "pack": Case(
        module="wan_mlperf.submit.__main__",
        arguments=[
            *("pack", "@campaign", "--submitter", "ORG", "--division", "open", "--system", "@8xGPU.json", "--dry-run"),
            *("-o", "@tree"),
        ],
        leaves=["tree/open/ORG/systems/8xGPU.json", "tree/open/ORG/documentation/calibration.md"],
        needs=["campaign"],
    ),
    "search": Case(
        module="wan_mlperf.search.__main__",
        arguments=[
            *("--recipe", "@my.yaml", "--model", "@model", "--forwards", "5", "--division", "open", "--worst-edge", "5"),
            *("--prompts", "1", "--finalists", "1", "--set=mesh.ranks=1", *WORKLOAD, "--set=workload.steps=3", "-o", "@found"),
        ],
        leaves=["found/search.json", "found/search.html", "found/recipe.yaml"],
    ),
    "fidelity": Case(
        module="wan_mlperf.bench.__main__",
        arguments=[
            *("fidelity", "--recipe", "@my.yaml", "--model", "@model", "--prompts", "1", "--json", "@fidelity.json"),
            *("--outputs", "@fidelity", "--set=mesh.ranks=1", *WORKLOAD),
        ],
        leaves=["fidelity.json"],
    ),
    "profile": Case(
        module="wan_mlperf.bench.__main__",
        arguments=["profile", "--recipe", "@my.yaml", "--model", "@model", "--set=mesh.ranks=1", *WORKLOAD, "-o", "@profile"],
        leaves=["profile/profile-0.json", "profile/trace-0.json.gz"],
    ),
}


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Runner, Path]]:
    folder = tmp_path_factory.mktemp("disk")
    runner = Runner(folder, *{case.module for case in CASES.values()})
    yield runner, folder / "place"
    runner.close()


@pytest.fixture(scope="module")
def materials(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What users bring: a model, prompts, a recipe with its user.conf, two runs, an accuracy run."""
    top = tmp_path_factory.mktemp("materials")
    shutil.copytree(model, top / "model", copy_function=os.link)
    (top / "prompts.txt").write_text("a red circle\na blue square\n")
    settings = yaml.safe_load(Path(run_folders.TINY.folder, "tiny.yaml").read_text())
    (top / "my.yaml").write_text(yaml.safe_dump({**settings, "user_conf": "user.conf", "warmup_queries": 0}))
    (top / "user.conf").write_text("*.SingleStream.min_query_count = 2\n*.SingleStream.min_duration = 0\n")
    for name in ("a", "b"):
        run_folders.write(top / name, "singlestream", "performance")
    run_folders.videos(top / "scored", ["alley", "a person swimming in ocean"])
    commit = git(ROOT, "rev-parse", "HEAD")
    (top / "campaign").mkdir()
    Campaign.begin(top / "campaign", {one: run_folders.RECIPE for one in SCENARIOS}, dry_run=True, commit=commit)
    for scenario in SCENARIOS:
        performance = top / "campaign" / f"20260101-000000-{scenario}-performance"
        run_folders.write(performance, scenario, "performance", commit=commit)
        run_folders.write(
            top / "campaign" / f"20260101-000001-{scenario}-accuracy", scenario, "accuracy", commit=commit, queries=248
        )
        test04 = top / "campaign" / f"20260101-000002-{scenario}-test04"
        run_folders.write(test04, scenario, "test04", logs=performance, commit=commit)
    (top / "8xGPU.json").write_text(json.dumps(PERSON))
    return top


def refill(place: Path, materials: Path, case: Case) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for one in materials.iterdir():
        if one.is_file():
            shutil.copy(one, place)
        elif one.name in case.needs:
            shutil.copytree(one, place / one.name, copy_function=os.link if one.name == "model" else shutil.copy2)


def start(runner: Runner, place: Path, case: Case, **fault: Any) -> Any:
    env = {"WAN_MLPERF_CACHE": str(place / "cache"), **case.env}
    if case.one_rank:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = [str(place / one[1:]) if one.startswith("@") else one for one in case.arguments]
    return runner.run(case.module, *arguments, env=env, **fault)


def places(log: Sequence[str]) -> list[int]:
    """The first of each kind of call on each path, by its number from 1."""
    seen: dict[str, int] = {}
    for number, line in enumerate(log, start=1):
        seen.setdefault(re.sub(r"#\d+ \(deleted\)|(?<=\.wan_mlperf-)[\w-]+|\d{8}-\d{6}|[0-9a-f]{12,}", "*", line), number)
    return list(seen.values())


def whole(file: Path) -> bool:
    """Is it a complete file of its kind?"""
    content = file.read_bytes()
    if file.suffix == ".json" and "mlperf_log" not in file.name:
        return bool(json.loads(content))
    if file.suffix == ".html":
        return content.rstrip().endswith(b"</html>")
    if file.suffix == ".mp4":
        return len(read_mp4(file)) == 5
    return file.suffix not in (".yaml", ".txt", ".conf") or bool(content) or file.name.startswith("mlperf_log")


def check(case: Case, place: Path, before: set[Path], ended: Any, error: int, what: str, clean: int = 0) -> None:
    """What must hold after a command whose file system failed."""
    code, out, err, log = ended
    lines = err.strip().splitlines()
    failed = next((line for line in log if line.startswith("!")), "")
    told = f"{what}: {failed} with {os.strerror(error)}: code {code}\n{err}"
    assert "Traceback" not in err and "Exception ignored" not in err, told
    left = all((place / one).exists() for one in case.leaves)
    if code == clean and (left or (os.strerror(error) in err and str(place) in err)):
        pass  # the call was of no importance, or what a finished run lacks is told: its page, or the link to it
    elif case is CASES["doctor"] and code == 1:  # it is doctor's result
        assert os.strerror(error) in out, told
    else:
        assert code in (2, 3), told
        assert lines and lines[-1].startswith(("error: ", "failed")), told
        # A failed `stat` means only "not there" to os.path.exists, of which libraries make their own story.
        assert os.strerror(error) in lines[-1] or failed.startswith("!stat "), told
        assert str(place) in lines[-1], told
        assert len([line for line in lines if line.startswith(("error", "failed"))]) == 1, told
    for file in place.rglob("*"):
        if file in before or not file.is_file() or file.is_relative_to(place / "cache"):
            continue
        if any(part.startswith((TEMPORARY, "tmp")) for part in file.relative_to(place).parts):
            assert failed[1:].split()[0] in REMOVALS, told
        else:
            assert whole(file), f"{told}\n{file} is half a file"


def walk(runner: tuple[Runner, Path], materials: Path, name: str, chosen: Callable[[list[int]], Sequence[int]]) -> None:
    one, place = runner
    case = CASES[name]
    refill(place, materials, case)
    before = set(place.rglob("*"))
    clean, out, err, log = start(one, place, case)
    assert clean in (0, 1) and all(whole(place / file) for file in case.leaves), (clean, out, err)
    problems = []
    for turn, number in enumerate(chosen(places(log))):
        error = ERRORS[turn % len(ERRORS)]
        refill(place, materials, case)
        ended = start(one, place, case, fail_at=number, error=error, for_good=False)
        try:
            check(case, place, before, ended, error, f"{name}, call {number} of {len(log)}", clean)
        except AssertionError as problem:
            problems.append(str(problem).partition("\nassert ")[0])
    assert not problems, f"{len(problems)} of {len(chosen(places(log)))}:\n" + "\n".join(problems)


@pytest.mark.slow
def test_some_calls_fail(runner: tuple[Runner, Path], materials: Path) -> None:
    walk(runner, materials, "report", lambda numbers: numbers[::3])
    walk(runner, materials, "generate", lambda numbers: [numbers[10], numbers[len(numbers) // 2], numbers[-3]])


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a run per call: several hundred for `pack` and `search`
@pytest.mark.parametrize("name", CASES)
def test_each_call_fails_once(name: str, runner: tuple[Runner, Path], materials: Path) -> None:
    if name == "pack" and git(ROOT, "status", "--porcelain"):
        pytest.skip("packs a commit without changes")
    walk(runner, materials, name, lambda numbers: numbers)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_real_limit_on_a_file(ranks: int, model: Path, tmp_path: Path) -> None:
    """The system itself lets nobody write more than 1 KiB into a file: no library, and no rank that our launcher starts."""
    out = tmp_path / "out"
    words = ["a red circle", "-o", f"{out}/x.mp4", f"--model={model}", f"--set=mesh.ranks={ranks}", *SMALL[:3]]
    command = f"ulimit -f 1; exec {shlex.join([sys.executable, '-m', 'wan_mlperf.generate', *words])}"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "WAN_MLPERF_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode in (2, 3), done.stderr[-2000:]
    last = done.stderr.splitlines()[-1]
    assert last.startswith(("failed", "error")) and os.strerror(errno.EFBIG) in last, done.stderr[-2000:]
    assert str(out) in last or (ranks == 2 and "the memory that ranks share" in last), last  # which is a file to the system
    assert "Traceback" not in done.stderr and not list(out.iterdir())
