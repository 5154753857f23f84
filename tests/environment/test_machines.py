"""Machines that are set up differently: where nothing can be written, other permissions, a user's files with modules' names.

Each is a command as a user types it, small, on one rank and where it matters on two. What must come out is the video, or one line
before the work.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.brought.command import SMALL
from tests.conftest import ROOT
from tests.leftovers.place import Place

pytestmark = pytest.mark.slow

ONE, TWO = ("--set=mesh.ranks=1",), ()
# What Python itself does not load before it comes to our package. A module types.py takes `python -P -m`.
MODULES = ("random", "torch", "numpy", "json", "yaml", "queue", "tempfile", "sut", "copy", "rich", "safetensors")
Mount = Callable[..., Path]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a file system of its own, with these options of tmpfs. Skips the test where that is not allowed."""
    mounted: list[Path] = []

    def mount(name: str, options: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def generate(place: Place, *more: str, model: Path | None, output: str = "x.mp4", **variables: str) -> tuple[int, str]:
    """Make a small video; returns exit code and output."""
    own = [] if model is None else ["--model", str(model)]
    job = place.start(["wan_mlperf.generate", "a circle", *SMALL, *own, "-o", output, *more], **variables)
    code, _ = job.finish()
    return code, job.output


def one_line(output: str) -> str:
    (line,) = output.splitlines()
    return line


@pytest.mark.parametrize("ranks", [ONE, TWO])
def test_a_working_folder_that_cannot_be_written(ranks: tuple[str, ...], place: Place, mount: Mount, model: Path) -> None:
    mount("cwd", "ro,size=64k")
    code, output = generate(place, *ranks, model=model, output=str(place.root / "out.mp4"))
    assert code == 0 and (place.root / "out.mp4").is_file(), output
    code, output = generate(place, *ranks, model=model)
    assert code == 2 and "not writable (Read-only file system)" in one_line(output)


def test_a_run_in_a_working_folder_that_cannot_be_written(place: Place, mount: Mount, model: Path) -> None:
    mount("cwd", "ro,size=64k")
    words = ["--set=workload.steps=2", "--set=workload.height=32", "--set=workload.width=32", "--set=workload.frames=5"]
    words = ["wan_mlperf.run", "--scenario", "offline", "--model", str(model), *words]
    job = place.start([*words, "--outputs", str(place.root / "outputs")])
    assert job.finish()[0] == 0 and "VALID" in job.output, job.output
    job = place.start(words)
    assert job.finish()[0] == 2 and "not writable (Read-only file system)" in one_line(job.output)


def test_no_home_at_all(place: Place, model: Path) -> None:
    code, output = generate(place, *ONE, model=model, HOME="")
    assert code == 0, output
    code, output = generate(place, *ONE, model=model, output="y.mp4", HOME="/proc/none")
    assert code == 0 and {"x.mp4", "y.mp4"} <= {one.name for one in place.working.iterdir()}, output


def test_a_full_cache_disk(place: Place, mount: Mount, model: Path) -> None:
    """Needed for the embedded model alone: a folder of one's own does without."""
    cache = mount("cache", "size=64k")
    (cache / "full").write_bytes(bytes(64 << 10))
    code, output = generate(place, *ONE, model=model, WAN_MLPERF_CACHE=str(cache))
    assert code == 0, output
    code, output = generate(place, *ONE, model=None, output="y.mp4", WAN_MLPERF_CACHE=str(cache))
    assert code == 2 and str(cache) in one_line(output) and "No space left on device" in output
    assert {one.name for one in cache.iterdir()} <= {"full", "inductor"}


@pytest.mark.parametrize("ranks", [ONE, TWO])
@pytest.mark.parametrize("kind", ["elsewhere", "read-only", "missing", "full"])
def test_a_temporary_folder_elsewhere(kind: str, ranks: tuple[str, ...], place: Place, mount: Mount, model: Path) -> None:
    folder = place.root / "missing"
    if kind != "missing":
        folder = mount("other", "ro,size=64k" if kind == "read-only" else "size=64k")
    if kind == "full":
        (folder / "full").write_bytes(bytes(64 << 10))
    code, output = generate(place, *ranks, model=model, TMPDIR=str(folder))
    assert code == 0 and (place.working / "x.mp4").is_file(), output
    assert kind == "missing" or {one.name for one in folder.iterdir()} <= {"full"}


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_permissions_follow_the_umask(mask: int, place: Place, model: Path) -> None:
    (place.root / "prompts.txt").write_text("a circle\na square\n")
    before = os.umask(mask)
    try:
        words = ["wan_mlperf.generate", "--prompts", str(place.root / "prompts.txt"), *SMALL, "--model", str(model), "-o", "v"]
        job = place.start(words)
        code, _ = job.finish()
    finally:
        os.umask(before)
    assert code == 0, job.output
    made = {one: stat.S_IMODE(one.stat().st_mode) for one in [place.working / "v", *(place.working / "v").iterdir()]}
    assert {one.name for one in made} == {"v", "0.mp4", "1.mp4", "manifest.json"}
    assert all(mode == (0o777 if one.is_dir() else 0o666) & ~mask for one, mode in made.items()), made


@pytest.mark.parametrize("ranks", [ONE, TWO])
def test_files_named_like_modules(ranks: tuple[str, ...], place: Place, model: Path) -> None:
    for name in MODULES:
        (place.working / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the user was taken')\n")
    (place.working / "wan_mlperf").mkdir()
    code, output = generate(place, *ranks, model=model)
    assert code == 0 and (place.working / "x.mp4").is_file(), output


@pytest.mark.parametrize("name", ["types", "wan_mlperf"])
def test_what_python_would_take_first_needs_its_own_switch(name: str, place: Place) -> None:
    (place.working / f"{name}.py").write_text("raise SystemExit('taken')\n")
    words = [sys.executable, "-P", "-m", "wan_mlperf.generate", ""]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=place.working, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, "'' is empty" in one_line(done.stderr)) == (2, True), done.stderr
