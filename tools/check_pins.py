"""Check that the pins install with the ordinary torch, even where another build is installed: `python tools/check_pins.py`.

For CI. Reads the requirements of torch's wheel for Linux and, where Python 3.12 is installed, also asks pip's resolver. Nothing
is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "3.12"
LINUX = {
    "python_version": PYTHON,
    "python_full_version": f"{PYTHON}.0",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
}


def pins(file: Path = ROOT / "constraints.txt") -> dict[str, str]:
    """Return canonical name -> version of a constraints file."""
    lines = (line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    split = (line.partition("==") for line in lines if line)
    return {canonicalize_name(name): version for name, _, version in split}


def broken(required: Iterable[str], pinned: Mapping[str, str], environment: Mapping[str, str] | None = None) -> list[str]:
    """Return the requirements, written as in a distribution's metadata, that a pin does not fulfil."""
    found = []
    for text in required:
        requirement = Requirement(text)
        version = pinned.get(canonicalize_name(requirement.name))
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": "", **(environment or {})})
        if version is not None and applies and not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{text}, pinned is {version}")
    return found


def pip(python: str, *words: str) -> dict[str, Any]:
    """Return pip's report on a dry run, without local wheel folders: those may hold another build of torch."""
    env = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run", "--ignore-installed"]
        done = subprocess.run([*command, "--report", str(report), *words], cwd=ROOT, env=env, check=False)
        if done.returncode:
            sys.exit(f"pip cannot resolve the pins: {' '.join(words)}")
        content: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return content


def interpreter() -> str | None:
    """Return a Python 3.12 that runs, from PATH or pyenv, or None."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for candidate in (shutil.which(f"python{PYTHON}"), *map(str, sorted(pyenv.glob(f"versions/{PYTHON}.*/bin/python3")))):
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
            return candidate
    return None


def main() -> int:
    """Check, and return 1 if the pins do not fit."""
    pinned = pins()
    with tempfile.TemporaryDirectory() as target:
        wheel = ["--only-binary=:all:", "--platform", "manylinux_2_28_x86_64", "--python-version", PYTHON, "--target", target]
        report = pip(sys.executable, "--no-deps", *wheel, f"torch=={pinned['torch']}")
    metadata = report["install"][0]["metadata"]
    wrong = broken(metadata.get("requires_dist", []), pinned, LINUX)
    print(f"torch {metadata['version']} for Linux: {'; '.join(wrong) or 'the pins fulfil what it requires'}", flush=True)
    python = interpreter()
    if python is None:
        print(f"no Python {PYTHON} here: pip's resolver was not asked")
        return 1 if wrong else 0
    report = pip(python, "-c", "constraints.txt", ".[cpu,dev]")
    versions: dict[str, str] = {
        canonicalize_name(one["metadata"]["name"]): one["metadata"]["version"] for one in report["install"]
    }
    unpinned = sorted(name for name in versions if name not in pinned and name != "wan-mlperf")
    print(f"Python {PYTHON}: {len(versions)} packages resolved, torch {versions['torch']}, triton {versions['triton']}")
    print(f"without a pin: {', '.join(unpinned) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
