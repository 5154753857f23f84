"""A checkout, and a campaign made from its commit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import run_folders
from tests.submit.packing import SCENARIOS, git
from wan_mlperf.submit.campaign import Campaign


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkout, and a whole dry-run campaign made from its commit."""
    top = tmp_path_factory.mktemp("made")
    source, campaign = top / "source", top / "campaign"
    (source / "sut").mkdir(parents=True)
    (source / "sut" / "code.py").write_text("print()\n")
    (source / ".gitignore").write_text("outputs/\n")
    git(source, "init", "-q")
    git(source, "add", "-A")
    git(source, "commit", "-q", "-m", "one")
    (source / "outputs").mkdir()
    (source / "outputs" / "large").write_text("not part of the commit")
    campaign.mkdir()
    commit = git(source, "rev-parse", "HEAD")
    Campaign.begin(campaign, {one: run_folders.RECIPE for one in SCENARIOS}, dry_run=True, commit=commit)
    for scenario in SCENARIOS:
        performance = campaign / f"20260101-000000-{scenario}-performance"
        run_folders.write(performance, scenario, "performance", commit=commit)
        run_folders.write(campaign / f"20260101-000001-{scenario}-accuracy", scenario, "accuracy", commit=commit, queries=248)
        test04 = campaign / f"20260101-000002-{scenario}-test04"
        run_folders.write(test04, scenario, "test04", logs=performance, commit=commit)
    return source, campaign


@pytest.fixture
def copy(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same, to be spoilt by one test."""
    shutil.copytree(made[0], tmp_path / "source")
    shutil.copytree(made[1], tmp_path / "campaign")
    return tmp_path / "source", tmp_path / "campaign"
