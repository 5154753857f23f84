"""result.json: its keys, that it reads back, and that every command refuses another version, or half of one, in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sut import compliance
from sut import result as results
from tests import run_folders
from wan_mlperf import process
from wan_mlperf.errors import BadInput
from wan_mlperf.report import __main__ as report
from wan_mlperf.submit.campaign import Campaign, Stage
from wan_mlperf.vbench import __main__ as vbench
from wan_mlperf.vbench import summary as vbench_summary

EVERY = {
    *("version", "scenario", "mode", "valid", "queries", "world_size", "mesh", "device", "checkpoint", "noise", "kernels"),
    *("recipe", "workload", "workload_is_mlperf", "spans", "prompts_are_mlperf", "generate_mean_s", "start_s", "experts"),
    *("host", "versions", "commit", "system", "plan", "sample_seconds"),
}
LATENCIES = {"latency_mean_s", "latency_p90_s", "latency_early_stopping_s", "latency_percentiles_s"}


def make(folder: Path, scenario: str = "singlestream", mode: str = "performance", **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(run_folders.RECIPE)
    (folder / "result.json").write_text(json.dumps(run_folders.result(scenario, mode, **changes)))
    return folder


@pytest.mark.parametrize(
    ("scenario", "mode", "changes", "more"),
    [
        ("singlestream", "performance", {}, LATENCIES),
        ("singlestream", "performance", {"latency_early_stopping_s": None}, LATENCIES),
        ("offline", "performance", {}, {"samples_per_second"}),
        ("offline", "performance", {"compliance": run_folders.audit_outcome("x")}, {"samples_per_second", "compliance"}),
        ("offline", "accuracy", {}, set()),
        ("singlestream", "accuracy", {"valid": False, "invalid_reason": "x"}, {"invalid_reason"}),
    ],
)
def test_the_keys_and_that_they_read_back(
    tmp_path: Path, scenario: str, mode: str, changes: dict[str, Any], more: set[str]
) -> None:
    result = results.read(make(tmp_path / "run", scenario, mode, **changes))
    results.write(tmp_path, result)
    # Keys that the tree may gain are welcome; these are what scripts rely on.
    keys = set(json.loads((tmp_path / "result.json").read_text()))
    optional = LATENCIES | {"samples_per_second", "compliance", "invalid_reason"}
    assert keys >= EVERY | more and not keys & (optional - more)
    assert results.read(tmp_path) == result


def spoil_version(file: Path) -> None:
    run_folders.rewrite(file, version=99)


def spoil_half(file: Path) -> None:
    file.write_text(file.read_text()[:200])


def spoil_key(file: Path) -> None:
    values = json.loads(file.read_text())
    del values["valid"]
    file.write_text(json.dumps(values))


def spoil_type(file: Path) -> None:
    run_folders.rewrite(file, valid="yes")


def spoil_older(file: Path) -> None:
    values = json.loads(file.read_text())
    del values["version"]
    file.write_text(json.dumps(values))


SPOILT = [
    pytest.param(spoil_version, r"is of version 99, and this program reads 1", id="another version"),
    pytest.param(spoil_half, r"half a file, or not JSON", id="half a file"),
    pytest.param(spoil_key, r"valid: Field required", id="a key missing"),
    pytest.param(spoil_type, r"valid: Input should be a valid boolean", id="a wrong type"),
    pytest.param(spoil_older, r"has no version", id="no version"),
]


@pytest.mark.parametrize(("spoil", "says"), SPOILT)
def test_every_command_refuses_a_result_that_is_not_one(tmp_path: Path, spoil: Callable[[Path], None], says: str) -> None:
    run = make(tmp_path / "20260101-000000-offline-performance", "offline")
    spoil(run / "result.json")
    with pytest.raises(BadInput, match=says) as error:
        report.main([str(run)])
    assert "\n" not in process.one_line(error.value) and "result.json" in str(error.value)
    with pytest.raises(BadInput, match=says):
        compliance.find_reference(tmp_path, str(run), scenario="offline", recipe_yaml=run_folders.RECIPE, commit="c0ffee")
    with pytest.raises(BadInput, match=says):
        compliance.find_reference(tmp_path, None, scenario="offline", recipe_yaml=run_folders.RECIPE, commit="c0ffee")
    with pytest.raises(BadInput, match=says):
        vbench.main([str(run), "--parse-only"])
    campaign = Campaign(folder=tmp_path, recipes={"offline": run_folders.RECIPE}, dry_run=False, commit="c0ffee")
    state = campaign.state(Stage(scenario="offline", kind="performance"))
    assert not state.done and says.replace("\\", "") in state.note


@pytest.mark.parametrize(("spoil", "says"), SPOILT)
def test_every_command_refuses_a_summary_that_is_not_one(tmp_path: Path, spoil: Callable[[Path], None], says: str) -> None:
    run = make(tmp_path / "20260101-000000-offline-accuracy", "offline", "accuracy")
    run_folders.write_summary(run, 70.1)
    (run / "accuracy.txt").write_text("{'vbench_score': 70.1}\n")
    campaign = Campaign(folder=tmp_path, recipes={"offline": run_folders.RECIPE}, dry_run=False, commit="c0ffee")
    assert campaign.state(Stage(scenario="offline", kind="vbench")).done
    assert vbench_summary.read(run).score == 70.1
    spoil(run / "vbench" / "summary.json")
    with pytest.raises(BadInput, match=says):
        report.main([str(run)])
    state = campaign.state(Stage(scenario="offline", kind="vbench"))
    assert not state.done and says.replace("\\", "") in state.note
