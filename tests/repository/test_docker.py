"""The Dockerfiles, which cannot be built without their base images: grammar, what they copy and call, and what they pin."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
INSTRUCTIONS = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "CMD"}


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, rest) of each logical line."""
    text = re.sub(r"^#.*\n", "", file.read_text(encoding="utf-8"), flags=re.M).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def commands(file: Path) -> list[str]:
    """The commands of its heading: how to build and run."""
    heading = re.findall(r"^#   (.*)$", file.read_text(encoding="utf-8"), flags=re.M)
    return re.split(r"\n(?=docker)", "\n".join(heading).replace("\\\n", " "))


def test_there_is_one_for_each_vendor() -> None:
    assert [file.name for file in FILES] == ["cuda.Dockerfile", "rocm.Dockerfile"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_it_is_a_dockerfile(file: Path) -> None:
    lines = instructions(file)
    assert {name for name, _ in lines} <= INSTRUCTIONS
    assert [name for name, _ in lines][:2] == ["ARG", "FROM"], "its base can be chosen"
    declared = {rest.split("=")[0] for name, rest in lines if name == "ARG"}
    for name, rest in lines:
        assert set(re.findall(r"\$\{(\w+)\}", rest)) <= declared, rest
        if name == "RUN":
            for command in rest.split("&&"):
                assert shlex.split(command), rest


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_containers_own_packages_stay(file: Path) -> None:
    runs = [rest for name, rest in instructions(file) if name == "RUN"]
    assert any("make install" in rest for rest in runs), "tools/install.py keeps what the container brings"
    assert not re.search(r"pip3? install\S* .*\b(torch|triton)\b", " ".join(runs))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert not any(one.startswith(("triton", "aiter", "amd-aiter")) for one in project["dependencies"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_its_heading_says_how_to_build_and_run_it(file: Path) -> None:
    build, run = commands(file)
    words = shlex.split(build)
    assert words[:2] == ["docker", "build"] and words[words.index("-f") + 1] == f"docker/{file.name}"
    words = shlex.split(run)
    assert words[:2] == ["docker", "run"]
    recipe = words[words.index("--recipe") + 1]
    assert (ROOT / recipe).is_file()
    tag = shlex.split(build)[shlex.split(build).index("-t") + 1]
    assert tag in words
