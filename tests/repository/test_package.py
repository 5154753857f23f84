"""The package away from its checkout: what a wheel holds, whose commit it names, and one line where it cannot run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import wan_mlperf
from tests.conftest import ROOT, SMALL
from wan_mlperf import identity

pytestmark = pytest.mark.job


def run(command: list[str], *, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    full = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(command, cwd=cwd, env=full, capture_output=True, text=True, timeout=300, check=False)


def git(*words: str, cwd: Path) -> str:
    author = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    done = run(["git", *author, *words], cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the files that git knows, from a copy, so that nothing is left in the checkout."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in git("ls-files", cwd=ROOT).splitlines():
        if name.split("/")[0] in ("wan_mlperf", "sut", "configs") or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    git("init", "-q", cwd=source)
    git("add", "-A", cwd=source)
    git("commit", "-q", "-m", "a copy", cwd=source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    done = run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(target), str(source)], cwd=target)
    assert done.returncode == 0, done.stderr
    (file,) = target.glob("*.whl")
    with zipfile.ZipFile(file) as content:
        assert content.read("wan_mlperf/COMMIT").decode() == git("rev-parse", "HEAD", cwd=source) + "\n"
    return file


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content in `site`, inside a repository that has nothing to do with it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder / "site")
    (folder / ".gitignore").write_text("site/\n")
    git("init", "-q", cwd=folder)
    git("add", ".gitignore", cwd=folder)
    git("commit", "-q", "-m", "another project", cwd=folder)
    return folder


def module(elsewhere: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m words` in that folder, with the installed package before any other."""
    return run([sys.executable, "-m", *words], cwd=elsewhere, env={"PYTHONPATH": str(elsewhere / "site")})


def test_a_wheel_has_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        packed = {name for name in content.namelist() if ".dist-info/" not in name}
    known = git("ls-files", "wan_mlperf", "sut", "configs", cwd=ROOT).splitlines()
    assert packed == {f"wan_mlperf/{name}" if name.startswith("configs/") else name for name in known} | {"wan_mlperf/COMMIT"}
    assert {"wan_mlperf/py.typed", "wan_mlperf/configs/tiny.yaml", "wan_mlperf/configs/mlperf/test04.config"} <= packed


def test_recipes_are_found_from_another_folder(elsewhere: Path) -> None:
    done = run([sys.executable, "-c", WHERE], cwd=elsewhere, env={"PYTHONPATH": str(elsewhere / "site")})
    site = elsewhere / "site" / "wan_mlperf"
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(site), (site / "COMMIT").read_text().strip(), "sage_fp4", str(site / "configs")]


WHERE = """
from pathlib import Path
from wan_mlperf import identity
from wan_mlperf.recipe import load_recipe
recipe = load_recipe("mi355x-offline")
print(Path(identity.__file__).parent, identity.commit(), recipe.attention.early, recipe.folder)
"""


@pytest.mark.slow
def test_commands_from_another_folder(elsewhere: Path, model: Path) -> None:
    done = module(elsewhere, "wan_mlperf.run", "--explain")
    assert done.returncode == 0 and "sage_fp4" in done.stdout, done.stderr
    small = [*SMALL, "--set=workload.seed=1", "--model", str(model)]
    done = module(elsewhere, "wan_mlperf.generate", "a red circle", "-o", "circle.mp4", *small)
    assert done.returncode == 0 and (elsewhere / "circle.mp4").stat().st_size, done.stderr
    results: list[dict[str, Any]] = []
    for more in ([], ["--test04"]):
        done = module(elsewhere, "wan_mlperf.run", *small, *more)
        assert done.returncode in (0, 1), done.stderr
        results.append(json.loads((elsewhere / "outputs" / "latest" / "result.json").read_text()))
    commit = (elsewhere / "site/wan_mlperf/COMMIT").read_text().strip()
    assert [(one["valid"], one["commit"]) for one in results] == [(True, commit)] * 2
    assert results[1]["compliance"]["test"] == "TEST04"  # its verdict compares times, which are this machine's


def test_the_commit_is_the_packages_own(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = git("rev-parse", "HEAD", cwd=ROOT)
    assert identity.commit().removesuffix("-dirty") == own
    monkeypatch.chdir(elsewhere)  # the working folder's repository does not count
    monkeypatch.setenv("GIT_DIR", str(elsewhere / ".git"))  # nor the one of a git hook that this runs in
    assert identity.commit().removesuffix("-dirty") == own
    monkeypatch.setattr(identity, "FILE", elsewhere / "site" / "wan_mlperf" / "none")  # nor the one around an environment
    assert identity.commit() == "unknown"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sys.platform": "darwin"}, "triton, which xDiT imports, has no wheel for it"),
        ({"sys.platform": "win32"}, "triton, which xDiT imports, has no wheel for it"),
        ({"platform.machine": lambda: "riscv64"}, "torch, triton and LoadGen have no wheels for this processor"),
        ({"platform.libc_ver": lambda: ("", "")}, "torch and triton have no wheels for another C library"),
        ({"sys.version_info": (3, 10, 13)}, "make run PYTHON=python3.12"),
    ],
)
def test_another_system_is_told_what_is_needed(changes: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wan_mlperf._why_not_here(command=True) is None
    for name, value in changes.items():
        monkeypatch.setattr(name, value)
    problem = wan_mlperf._why_not_here(command=True)
    assert problem is not None and says in problem and "needed: Linux with glibc on x86-64 or ARM64" in problem
    assert platform.python_version() in problem and "\n" not in problem


def test_one_line_instead_of_a_failing_import() -> None:
    for code, says in (
        ("import sys; sys.platform = 'darwin'; import wan_mlperf", "error: this is "),
        (
            "import sys; sys.modules['diffusers'] = None; from wan_mlperf import process, run; process.entry(run.main)",
            "error: package diffusers is not installed; allowed: .venv/bin/python after `make run`, or `make install` first",
        ),
    ):
        done = run([sys.executable, "-c", code], cwd=ROOT)
        assert done.returncode == 2 and done.stderr.startswith(says) and done.stderr.count("\n") == 1, done.stderr
