"""`submit pack`: the tree file by file, and what it refuses in either division."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.run_folders import audit_outcome
from tests.submit import tree
from tests.submit.packing import PERSON, contents, git, make_real, pack, spoil
from wan_mlperf.checkpoint import HUB_NAME, HUB_REVISION
from wan_mlperf.errors import BadInput
from wan_mlperf.submit import __main__ as submit


@pytest.mark.parametrize("division", ["open", "closed"])
def test_a_dry_runs_tree_is_whole_and_the_campaign_untouched(made: tuple[Path, Path], tmp_path: Path, division: str) -> None:
    source, campaign = made
    before = contents(campaign)
    notes = pack(source, campaign, tmp_path / "out", division=division)
    root = tmp_path / "out" / division / "ORG"
    tree.check(root, campaign, system="8xGPU", scored=False)
    assert contents(campaign) == before
    code = root / "src" / "wan-2.2-t2v-a14b" / "wan_mlperf"
    files = {path.relative_to(code).as_posix() for path in code.rglob("*") if path.is_file()}
    assert files == {"sut/code.py", "REPRODUCIBILITY.json"}  # not .gitignore, not .ci
    assert json.loads((root / "systems" / "8xGPU.json").read_text())["cooling"] == "to be filled in"
    refused = [note for note in notes if note.startswith("MLCommons' checker will refuse: ")]
    asked = [note for note in notes if note.startswith("the rules ask for more: ")]
    assert refused + asked == notes
    everywhere = "singlestream performance, singlestream test04, offline performance, offline test04: min_duration is 0 s"
    assert any(everywhere in note for note in refused)
    assert any("status, system_name, system_type" in note for note in refused)  # what a person must fill
    assert any("no score: a dry run does not ask for one" in note for note in (refused if division == "closed" else asked))
    assert any("its workload is not the benchmark's" in note for note in asked)
    if division == "closed":
        assert any("fixed_latent" in note for note in asked) and any("ECC" in note for note in asked)
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
    made_by = json.loads((root / "src" / "wan-2.2-t2v-a14b" / "wan_mlperf" / "REPRODUCIBILITY.json").read_text())
    assert made_by["model"] == {"name": HUB_NAME, "revision": HUB_REVISION} and made_by["commits"] == {"torch": "cafe"}
    assert made_by["harness_commit"] == git(source, "rev-parse", "HEAD") and made_by["loadgen"].startswith("6.0.17 @ ")
    assert made_by["vbench"]["Offline"]["versions"] == {"vbench": "0.1.5"}
    paths = (root / "documentation" / "bandwidth.md").read_text()
    # Offline's 0.4 samples/s and SingleStream's one in 2.5 s are the same rate.
    assert "| 89.95 MB/s (0.72 Gb/s) |" in paths and "eth0 100000 Mb/s" in paths and "32.0 GT/s PCIe x16" in paths
    assert "| Offline | performance | VALID, 0.4000 samples/s |" in (root / "README.md").read_text()


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


def test_a_dry_run_is_refused_as_a_submission(made: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"it is a dry run's.*its workload is not the benchmark's"):
        pack(*made, tmp_path / "out", PERSON, dry_run=False)


def test_bad_input_of_pack(copy: tuple[Path, Path], tmp_path: Path) -> None:
    source, campaign = copy
    make_real(campaign)
    with pytest.raises(BadInput, match="no such field 'coling', did you mean 'cooling'"):
        pack(source, campaign, tmp_path / "out", {"coling": "air"}, dry_run=False)
    with pytest.raises(BadInput, match="status is 'now'; allowed: available, preview, rdi"):
        pack(source, campaign, tmp_path / "out", {**PERSON, "status": "now"}, dry_run=False)
    with pytest.raises(BadInput, match=r"submitter '\.\./x' is a folder's name"):
        pack(source, campaign, tmp_path / "out", PERSON, submitter="../x", dry_run=False)
    (run,) = campaign.glob("*-offline-accuracy")
    (run / "accuracy.txt").write_text("{'vbench_score': 70.5}\nhash=00\n")
    with pytest.raises(BadInput, match=r"offline accuracy: hash=00 in accuracy\.txt is not that of mlperf_log_accuracy\.json"):
        pack(source, campaign, tmp_path / "out", PERSON, dry_run=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["8xGPU.json", "campaign", "source"]


def test_the_source_must_be_the_commit_that_made_the_results(copy: tuple[Path, Path], tmp_path: Path) -> None:
    source, campaign = copy
    (source / "new.py").write_text("")
    with pytest.raises(BadInput, match=r"the source tree is dirty, 1 files such as 'new\.py'"):
        pack(source, campaign, tmp_path / "out")
    git(source, "add", "-A")
    git(source, "commit", "-q", "-m", "two")
    with pytest.raises(BadInput, match=r"singlestream performance, singlestream accuracy, .*: of another commit"):
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
