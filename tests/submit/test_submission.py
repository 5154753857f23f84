"""`submit pack`: the tree file by file, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sut.result import Scenario
from tests import run_folders
from tests.run_folders import audit_outcome, rewrite
from tests.submit import tree
from wan_mlperf.checkpoint import HUB_NAME, HUB_REVISION
from wan_mlperf.errors import BadInput
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
    """Turn a dry run's campaign into the benchmark's own, scored: all that a closed submission must have."""
    rewrite(campaign / "campaign.json", dry_run=False)
    for run in campaign.glob("2026*"):
        system = json.loads((run / "result.json").read_text())["system"]
        rewrite(
            run / "result.json",
            workload_is_mlperf=True,
            checkpoint=HUB_NAME,
            model_revision=HUB_REVISION,
            noise="fixed latent fixed_latent.pt",
            division="closed",
            division_reasons=[],
            system={**system, "ecc": "on: on 8 of 8 GPUs", "network": "eth0 100000 Mb/s", "pcie": "8 x 32.0 GT/s PCIe x16"},
        )
        if (run / "mlperf_log_detail.txt").is_file():
            run_folders.lengthen(run)
    for run in campaign.glob("*-accuracy"):
        run_folders.score(run, score)


def contents(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


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


def test_a_dry_run_is_refused_as_a_submission(made: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"it is a dry run's.*its workload is not the benchmark's"):
        pack(*made, tmp_path / "out", PERSON, dry_run=False)


def edit_log(run: Path, key: str, value: str) -> None:
    """Change a value of LoadGen's detail log."""
    log = run / "mlperf_log_detail.txt"
    text, number = re.subn(rf'("key": "{key}", "value": )[^,]+', rf"\g<1>{value}", log.read_text())
    assert number
    log.write_text(text)


def change(pattern: str, **changes: Any) -> Callable[[Path, dict[str, Any]], None]:
    return lambda campaign, _: spoil(campaign, pattern, **changes)


def change_system(field: str, value: str, pattern: str = "2026*") -> Callable[[Path, dict[str, Any]], None]:
    def apply(campaign: Path, _: dict[str, Any]) -> None:
        for run in campaign.glob(pattern):
            system = json.loads((run / "result.json").read_text())["system"]
            rewrite(run / "result.json", system={**system, field: value})

    return apply


def change_log(pattern: str, key: str, value: str) -> Callable[[Path, dict[str, Any]], None]:
    def apply(campaign: Path, _: dict[str, Any]) -> None:
        (run,) = campaign.glob(pattern)
        edit_log(run, key, value)

    return apply


def remove(pattern: str, name: str) -> Callable[[Path, dict[str, Any]], None]:
    def apply(campaign: Path, _: dict[str, Any]) -> None:
        (run,) = campaign.glob(pattern)
        (run / name).unlink()

    return apply


LATENT = "model.fixed_latent: the noise is drawn from seed 42, not MLCommons' fixed_latent.pt"
ONE_MISSING: dict[str, tuple[Callable[[Path, dict[str, Any]], None], str]] = {
    "fixed latent": (change("*-offline-accuracy", division_reasons=[LATENT]), f"offline accuracy: {LATENT}"),
    "duration": (
        change_log("*-offline-performance", "effective_min_duration_ms", "60000"),
        "offline performance: min_duration is 60 s; allowed: 600 s or more",
    ),
    "queries": (
        change_log("*-singlestream-performance", "result_query_count", "20"),
        "singlestream performance: 20 queries; allowed: 64 or more",
    ),
    "samples": (
        change_log("*-offline-performance", "effective_samples_per_query", "100"),
        "offline performance: 100 samples; allowed: 248 or more",
    ),
    "accuracy samples": (
        change_log("*-offline-accuracy", "effective_accuracy_sample_count", "100"),
        "offline accuracy: 100 accuracy samples; allowed: 248",
    ),
    "performance sample count": (
        change_log("*-singlestream-performance", "effective_performance_sample_count", "20"),
        "singlestream performance: performance sample count 20; allowed: 50 or more",
    ),
    "seed": (
        change_log("*-offline-performance", "effective_qsl_rng_seed", "7"),
        "offline performance: qsl_rng_seed is 7; allowed: 2085463073848966840, that of v6.1",
    ),
    "LoadGen's errors": (
        change_log("*-offline-performance", "num_errors", "2"),
        "offline performance: 2 errors in LoadGen's log",
    ),
    "TEST04": (
        change("*-singlestream-test04", compliance=audit_outcome("x", "TEST FAIL: one repeated sample is 40.0% faster")),
        "singlestream test04: TEST FAIL: one repeated sample is 40.0% faster",
    ),
    "open choice": (
        change("*-offline-*", division_reasons=["guidance: no negative branch in steps 18 to 19"]),
        "offline performance, offline accuracy, offline test04: guidance: no negative branch in steps 18 to 19",
    ),
    "revision": (
        change("2026*", model_revision="0" * 40),
        f"model revision {'0' * 40}; allowed: {HUB_REVISION}",
    ),
    "ECC off": (change_system("ecc", "off: off on 1 of 8 GPUs"), "ECC is off: off on 1 of 8 GPUs; allowed: on"),
    "ECC unknown": (change_system("ecc", "unknown: DRAM not exposed here"), "system: whether ECC is on is unknown"),
    "nodes": (lambda _, person: person.update(number_of_nodes=2), "system: number_of_nodes is 2, but '1' ran"),
    "one system": (
        change_system("accelerator_model_name", "another", "*-offline-*"),
        "the runs are of different systems: accelerator_model_name is none and another",
    ),
    "network": (change_system("network", ""), "bandwidth: the run could not read the network links; allowed: describe them"),
    "slow network": (change_system("network", "eth0 100 Mb/s"), "bandwidth: the network's 100 Mb/s are below the 720 Mb/s"),
    "description": (lambda _, person: person.update(cooling=""), "system: to be filled in: cooling"),
    "audit video": (remove("*-offline-accuracy", "videos/123.mp4"), "offline accuracy: audit video 123 is not there"),
    "accuracy log": (
        remove("*-offline-accuracy", "mlperf_log_accuracy.json"),
        "offline accuracy: mlperf_log_accuracy.json is not",
    ),
    "score": (remove("*-offline-accuracy", "accuracy.txt"), "offline vbench: no score of the whole run"),
}


@pytest.mark.parametrize("name", ONE_MISSING)
def test_one_thing_is_missing_and_exactly_that_is_named(copy: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    source, campaign = copy
    make_real(campaign)
    spoil_one, says = ONE_MISSING[name]
    person = dict(PERSON)
    spoil_one(campaign, person)
    with pytest.raises(BadInput) as refused:
        pack(source, campaign, tmp_path / "out", person, division="closed", dry_run=False)
    head, listed = str(refused.value).split(" missing: ", 1)
    assert head.endswith("cannot be packed for the closed division, 1 thing is"), refused.value
    assert says in listed
    assert not (tmp_path / "out").exists()


def test_several_missing_things_are_one_list(copy: tuple[Path, Path], tmp_path: Path) -> None:
    source, campaign = copy
    make_real(campaign)
    person, names = dict(PERSON), ("duration", "ECC off", "description", "audit video", "score", "TEST04")
    for name in names:
        ONE_MISSING[name][0](campaign, person)
    (source / "new.py").write_text("")
    with pytest.raises(BadInput, match="7 things are missing: the source tree is dirty") as refused:
        pack(source, campaign, tmp_path / "out", person, division="closed", dry_run=False)
    assert all(ONE_MISSING[name][1] in str(refused.value) for name in names)


def test_what_a_person_may_state(copy: tuple[Path, Path], tmp_path: Path) -> None:
    source, campaign = copy
    make_real(campaign)
    ONE_MISSING["ECC unknown"][0](campaign, {})
    ONE_MISSING["network"][0](campaign, {})
    (tmp_path / "path.md").write_text("Two NICs of 100 Gb/s on the sockets' own PCIe roots.\n")
    person = {**PERSON, "hw_notes": "ECC enabled, seen with edac-util"}
    options: dict[str, Any] = {"division": "closed", "dry_run": False, "bandwidth": tmp_path / "path.md"}
    assert pack(source, campaign, tmp_path / "out", person, **options) == []
    assert "Two NICs of 100 Gb/s" in (tmp_path / "out" / "closed" / "ORG" / "documentation" / "bandwidth.md").read_text()
    for text, says in (("", "is empty"), (None, "cannot be read")):
        (tmp_path / "path.md").write_text(text) if text is not None else (tmp_path / "path.md").unlink()
        with pytest.raises(BadInput, match=says):
            pack(source, campaign, tmp_path / "other", person, **options)


def test_only_one_scenario_is_for_the_open_division(copy: tuple[Path, Path], tmp_path: Path) -> None:
    source, campaign = copy
    make_real(campaign)
    rewrite(campaign / "campaign.json", recipes={"offline": run_folders.RECIPE})
    with pytest.raises(BadInput, match="1 thing is missing: the closed division asks for singlestream, too"):
        pack(source, campaign, tmp_path / "out", PERSON, division="closed", dry_run=False)
    pack(source, campaign, tmp_path / "out", PERSON, dry_run=False)


def test_a_score_below_the_floor_is_for_the_open_division(copy: tuple[Path, Path], tmp_path: Path) -> None:
    source, campaign = copy
    make_real(campaign, score=69.5)
    with pytest.raises(BadInput, match=r"singlestream vbench, offline vbench: VBench 69\.5000 is below 69\.7752"):
        pack(source, campaign, tmp_path / "out", PERSON, division="closed", dry_run=False)
    pack(source, campaign, tmp_path / "out", PERSON, dry_run=False)


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
