"""What a result says of where things come from."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from wan_mlperf import identity

REVISION = "5be7df9619b54f4e2667b2755bc6a756675b5cd7"


def test_the_revision_of_a_folder(tmp_path: Path) -> None:
    assert identity.revision_of(tmp_path) == "unknown"
    cached = tmp_path / "models--a--b" / "snapshots" / REVISION
    cached.mkdir(parents=True)
    assert identity.revision_of(cached) == REVISION
    (tmp_path / "link").symlink_to(cached)
    assert identity.revision_of(tmp_path / "link") == REVISION
    note = tmp_path / "download" / ".cache" / "huggingface" / "download" / "model_index.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{REVISION}\n0123\n1790000000.5\n")  # as huggingface_hub writes it: commit, ETag, time
    assert identity.revision_of(tmp_path / "download") == REVISION


def test_the_container_is_what_its_starter_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(identity.CONTAINER, "rocm/pytorch-xdit:v26.6@sha256:0123")
    assert identity.container() == "rocm/pytorch-xdit:v26.6@sha256:0123"
    monkeypatch.delenv(identity.CONTAINER)
    assert identity.container() in ("none", "not stated")


def test_the_commit_of_a_package_built_from_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "xfuser-9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: xfuser\nVersion: 9\n")
    made = {"url": "https://example.org/xDiT", "vcs_info": {"vcs": "git", "commit_id": REVISION}}
    (folder / "direct_url.json").write_text(json.dumps(made))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: find(name, folder))
    assert identity.commits()["xfuser"] == REVISION and "torch" in identity.commits()


def find(name: str, folder: Path) -> importlib.metadata.Distribution:
    if name != "xfuser":
        raise importlib.metadata.PackageNotFoundError(name)
    return importlib.metadata.PathDistribution(folder)
