"""`submit pack`: the tree file by file, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sut.result import Scenario
from tests import run_folders
from tests.run_folders import audit_outcome, rewrite, write_summary
from tests.submit import tree
from wan_mlperf.errors import BadInput, Failed
from wan_mlperf.submit import __main__ as submit
from wan_mlperf.submit import submission
from wan_mlperf.submit.campaign import Campaign

SCENARIOS: tuple[Scenario, ...] = ("singlestream", "offline")
PERSON = {
    "status": "available",
    "system_name": "a machine",
    "system_type": "datacenter",
    "host_memory_configuration": "2 x 12 GiB",
    "host_storage_type": "NVMe",
    "host_networking": "Ethernet",
    "host_network_card_count": 1,
    "host_networking_topology": "one host",
    "cooling": "air",
}


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


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


def pack(source: Path, campaign: Path, output: Path, person: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    system = output.parent / "8xGPU.json"
    system.write_text(json.dumps({} if person is None else person))
    options: dict[str, Any] = {"submitter": "ORG", "division": "open", "dry_run": True, "system": system, "output": output}
    return submission.pack(campaign, source=source, **{**options, **changes})


def make_real(campaign: Path, *, score: float = 70.5) -> None:
    """Turn a dry run's campaign into the benchmark's own, scored."""
    rewrite(campaign / "campaign.json", dry_run=False)
    for run in campaign.glob("2026*"):
        rewrite(run / "result.json", workload_is_mlperf=True)
    for run in campaign.glob("*-accuracy"):
        write_summary(run, score, problems=[] if score >= 69.7752 else ["of something"])
        digest = hashlib.sha256((run / "mlperf_log_accuracy.json").read_bytes()).hexdigest()
        (run / "accuracy.txt").write_text(f"{{'vbench_score': {score}}}\nhash={digest}\n")


def contents(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_a_dry_runs_tree_is_whole_and_the_campaign_untouched(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, campaign = made
    before = contents(campaign)
    notes = pack(source, campaign, tmp_path / "out")
    root = tmp_path / "out" / "open" / "ORG"
    tree.check(root, campaign, system="8xGPU", scored=False)
    assert contents(campaign) == before
    assert {path.relative_to(root / "src").as_posix() for path in (root / "src").rglob("*") if path.is_file()} == {
        ".gitignore",
        "sut/code.py",
    }
    assert "status, system_name, system_type" in notes[0]  # what a person must fill
    assert json.loads((root / "systems" / "8xGPU.json").read_text())["cooling"] == "to be filled in"
    assert [note for note in notes if "no VBench score" in note] != []
    text = (root / "documentation" / "calibration.md").read_text()
    assert "MXFP4" in text and "No data set was used" in text
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("division", ["open", "closed"])
def test_the_benchmarks_own_campaign(copy: tuple[Path, Path], tmp_path: Path, division: str) -> None:
    source, campaign = copy
    make_real(campaign)
    assert pack(source, campaign, tmp_path / "out", PERSON, division=division, dry_run=False) == []
    root = tmp_path / "out" / division / "ORG"
    tree.check(root, campaign, system="8xGPU", scored=True)
    description = json.loads((root / "systems" / "8xGPU.json").read_text())
    assert description["cooling"] == "air" and description["host_processor_core_count"]


def spoil(campaign: Path, pattern: str, **changes: Any) -> None:
    for run in campaign.glob(pattern):
        rewrite(run / "result.json", **changes)


@pytest.mark.parametrize(
    ("pattern", "changes", "says"),
    [
        ("*-singlestream-performance", {"valid": False, "invalid_reason": "too short"}, "performance: INVALID: too short"),
        ("*-offline-accuracy", {"commit": "0123456789abcdef"}, "offline accuracy: of another commit, 0123456789ab"),
        ("*-offline-test04", {"compliance": audit_outcome("x", "TEST FAIL: x")}, "offline test04: TEST FAIL: x"),
        ("*-accuracy", {"workload_is_mlperf": False}, "its workload is not the benchmark's"),
        ("*-accuracy", {"prompts_are_mlperf": False}, "its prompts are not the benchmark's"),
    ],
)
def test_results_that_are_refused(copy: tuple[Path, Path], tmp_path: Path, pattern: str, changes: Any, says: str) -> None:
    source, campaign = copy
    make_real(campaign)
    spoil(campaign, pattern, **changes)
    with pytest.raises(BadInput, match=says):
        pack(source, campaign, tmp_path / "out", PERSON, dry_run=False)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_is_refused_as_a_submission_and_in_the_closed_division(made: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"it is a dry run's.*its workload is not the benchmark's"):
        pack(*made, tmp_path / "out", PERSON, dry_run=False)
    with pytest.raises(BadInput, match="open division only"):
        pack(*made, tmp_path / "out", PERSON, division="closed")


def test_a_score_below_the_floor_is_for_the_open_division(copy: tuple[Path, Path], tmp_path: Path) -> None:
    source, campaign = copy
    make_real(campaign, score=69.5)
    with pytest.raises(BadInput, match=r"singlestream vbench: VBench 69\.5000 is below 69\.7752"):
        pack(source, campaign, tmp_path / "out", PERSON, division="closed", dry_run=False)
    pack(source, campaign, tmp_path / "out", PERSON, dry_run=False)


def test_missing_parts(copy: tuple[Path, Path], tmp_path: Path) -> None:
    source, campaign = copy
    make_real(campaign)
    with pytest.raises(BadInput, match="to be filled in: cooling; allowed"):
        pack(source, campaign, tmp_path / "out", {**PERSON, "cooling": ""}, dry_run=False)
    with pytest.raises(BadInput, match="no such field 'coling', did you mean 'cooling'"):
        pack(source, campaign, tmp_path / "out", {"coling": "air"}, dry_run=False)
    with pytest.raises(BadInput, match="status is 'now'; allowed: available, preview, rdi"):
        pack(source, campaign, tmp_path / "out", {**PERSON, "status": "now"}, dry_run=False)
    with pytest.raises(BadInput, match=r"submitter '\.\./x' is a folder's name"):
        pack(source, campaign, tmp_path / "out", PERSON, submitter="../x", dry_run=False)
    (run,) = campaign.glob("*-offline-accuracy")
    (run / "videos" / "123.mp4").unlink()
    with pytest.raises(Failed, match="audit video 123 is not there"):
        pack(source, campaign, tmp_path / "out", PERSON, dry_run=False)
    (run / "accuracy.txt").write_text("{'vbench_score': 70.5}\nhash=00\n")
    with pytest.raises(Failed, match="hash=00 is not that of"):
        pack(source, campaign, tmp_path / "out", PERSON, dry_run=False)
    (run / "accuracy.txt").unlink()
    with pytest.raises(BadInput, match="offline vbench: no score of the whole run"):
        pack(source, campaign, tmp_path / "out", PERSON, dry_run=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["8xGPU.json", "campaign", "source"]


def test_the_source_must_be_the_commit_that_made_the_results(copy: tuple[Path, Path], tmp_path: Path) -> None:
    source, campaign = copy
    (source / "new.py").write_text("")
    with pytest.raises(BadInput, match=r"the source tree is dirty, 1 files such as 'new\.py'"):
        pack(source, campaign, tmp_path / "out")
    git(source, "add", "-A")
    git(source, "commit", "-q", "-m", "two")
    with pytest.raises(BadInput, match="singlestream performance: of another commit"):
        pack(source, campaign, tmp_path / "out")
    with pytest.raises(BadInput, match="git does not answer"):
        pack(tmp_path, campaign, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(BadInput, match="is there and not empty"):
        pack(source, campaign, tmp_path / "full")


def test_submit_system_fills_what_was_measured(made: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "8xGPU.json"
    words = ["system", str(made[1]), "-o", str(file)]
    assert submit.main(words) == 0
    description = json.loads(file.read_text())
    assert set(description) == (tree.SYSTEM_FILLED | tree.SYSTEM_THERE) - {"division", "submitter"}
    assert description["number_of_nodes"] == "1" and description["cooling"] == ""
    assert "to be filled in: status, system_name" in capsys.readouterr().out
    with pytest.raises(BadInput, match="is there already"):
        submit.main(words)
