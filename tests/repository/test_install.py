"""What a container's own packages are to `make install`, and what `make` offers."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import venv
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tools.install import pins


def test_a_containers_torch_is_pinned_as_it_is(tmp_path: Path) -> None:
    for name, version in (
        ("torch", "2.9.0+rocm7.0.2"),
        ("pytorch-triton-rocm", "3.5.0"),
        ("triton", "3.5.1+gitabc"),
        ("nvidia_cudnn_cu12", "9.10.2.21"),
        ("numpy", "1.26.4"),
    ):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (tmp_path / "broken-1.0.dist-info").mkdir()  # as an interrupted pip leaves them: no name at all
    found = importlib.metadata.distributions(path=[str(tmp_path)])
    assert pins(found) == [
        "nvidia_cudnn_cu12==9.10.2.21",
        "pytorch-triton-rocm==3.5.0",
        "torch==2.9.0+rocm7.0.2",
        "triton==3.5.1+gitabc",
    ]
    assert f"torch=={importlib.metadata.version('torch')}" in pins(importlib.metadata.distributions())


@pytest.mark.slow  # asks the package index
def test_make_install_keeps_the_torch_that_is_there(tmp_path: Path) -> None:
    """An environment with the metadata of a ROCm torch: pip would install the rest, and no torch, no triton."""
    venv.create(tmp_path, with_pip=True)
    (site,) = tmp_path.glob("lib/python3.*/site-packages")
    for name, version, requires in (
        ("torch", "2.9.1+rocm7.1.0", "Requires-Dist: pytorch-triton-rocm==3.5.1\n"),
        ("pytorch_triton_rocm", "3.5.1", ""),
    ):
        folder = site / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
        (folder / "RECORD").write_text("")
    command = [str(tmp_path / "bin" / "python"), "tools/install.py", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stderr
    assert "kept as installed: pytorch_triton_rocm==3.5.1, torch==2.9.1+rocm7.1.0" in done.stdout
    would = " ".join(line for line in done.stdout.splitlines() if line.startswith("Would install"))
    assert all(f" {name}-" in would for name in ("wan-mlperf", "xfuser", "diffusers", "vbench"))
    assert re.findall(r" (torch|triton|nvidia|pytorch)[-_a-z]*-\d\S*", would.replace("torchao-", "")) == []


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.M)
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in listed.splitlines()] == re.findall(r"^([a-z-]+):.*##", text, re.M)
    assert {line.split()[0] for line in listed.splitlines()} == set(phony.split())


def test_hooks_and_ci_call_what_is_there() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    tools = {hook["entry"].split()[0] for hook in hooks}
    pinned = (ROOT / "constraints.txt").read_text().lower()
    assert tools == {".venv/bin/ruff", ".venv/bin/mypy"} and "ruff==" in pinned and "mypy==" in pinned
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (job,) = yaml.safe_load(workflow)["jobs"].values()
    script = ROOT / job["steps"][-1]["run"]
    assert len(workflow.splitlines()) <= 12 and script.stat().st_mode & 0o111
