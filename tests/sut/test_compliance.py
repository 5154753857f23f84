"""TEST04's rule, and real LoadGen runs of an honest stand-in and of one that caches by sample."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sut import compliance
from sut.compliance import Score, compare, limit_of
from sut.loadgen import read_detail
from tests import run_folders
from tests.engine_stub import make_logs
from wan_mlperf import run
from wan_mlperf.errors import BadInput

NORMAL = Score(scenario="SingleStream", valid=True, same=False, value=0.0365)


def score(**changes: Any) -> Score:
    return Score(**{"scenario": "SingleStream", "valid": True, "same": True, "value": 0.0365, **changes})


@pytest.mark.parametrize(("scenario", "limit"), [("SingleStream", 0.2), ("Offline", 0.1)])
def test_less_than_the_limit_faster_passes_and_slower_always_does(scenario: str, limit: float) -> None:
    normal = dataclasses.replace(NORMAL, scenario=scenario)
    for factor in (0.2, 1.0, 0.9999 + limit):
        assert compare(normal, score(scenario=scenario, value=0.0365 * factor)) == "TEST PASS"
    for factor in (1.0001 + limit, 2.0, 1e6):
        verdict = compare(normal, score(scenario=scenario, value=0.0365 * factor))
        assert verdict.startswith("TEST FAIL: one repeated sample is") and verdict.endswith(f"less than {limit:.0%}")


def test_the_limit_is_that_of_mlcommons_script() -> None:
    """Its condition, written out: SingleStream and a reference score, in queries per second, of at most 200000."""
    for value in (0.0365, 200_000.0, 200_000.1):
        assert limit_of(dataclasses.replace(NORMAL, value=value))[0] == (0.20 if value <= 200000 else 0.10)
    assert limit_of(Score(scenario="Offline", valid=True, same=False, value=0.07))[0] == 0.10
    assert "20%" in limit_of(NORMAL)[1] and "verify_performance.py for SingleStream" in limit_of(NORMAL)[1]


@pytest.mark.parametrize(
    ("reference", "test", "says"),
    [
        (NORMAL, score(valid=False), "the test run is INVALID"),
        (score(same=False, valid=False), score(), "the reference run is INVALID"),
        (NORMAL, score(value=None), "the test run is INVALID"),
        (NORMAL, score(scenario="Offline"), "the reference is SingleStream, the test Offline"),
        (score(), score(), "not one with the audit file"),
        (NORMAL, score(same=False), "not one with the audit file"),
    ],
)
def test_runs_that_cannot_be_compared_fail(reference: Score, test: Score, says: str) -> None:
    assert compare(reference, test).startswith("TEST FAIL: ") and says in compare(reference, test)


@pytest.mark.job
@pytest.mark.parametrize("scenario", ["singlestream", "offline"])
def test_real_loadgen_honest_passes_and_a_cache_by_sample_fails(tmp_path: Path, scenario: str) -> None:
    # A busy machine makes equal runs differ by more than the rule allows, so the honest one has room: five times the time.
    normal, same, cached = tmp_path / "normal", tmp_path / "same", tmp_path / "cached"
    make_logs(normal, scenario, "performance", seconds=0.01)
    (normal / "result.json").write_text(json.dumps(run_folders.result(scenario, "performance", sample_seconds=[0.01] * 64)))
    make_logs(same, scenario, "performance", seconds=0.05, audit=True)
    verdict = compliance.verify(same, normal, [0.05] * 64)
    assert verdict.passed, verdict
    text = (same / "verify_performance.txt").read_text()
    assert text.splitlines()[-1] == "TEST PASS" and "reference score = " in text and "test score = " in text

    detail = read_detail(same)
    assert detail["effective_performance_issue_same"] is True and detail["effective_performance_issue_same_index"] == 3
    assert detail["effective_qsl_rng_seed"] == 2085463073848966840 and detail["num_errors"] == 0

    make_logs(cached, scenario, "performance", seconds=0.01, audit=True, cache=True)
    verdict = compliance.verify(cached, normal, [0.01] + [1e-5] * 80)
    assert not verdict.passed and "faster" in verdict.verdict and verdict.reference_seconds == (0.01,) * 64
    said = (cached / "verify_performance.txt").read_text()
    assert "TEST PASS" not in said and f"limit: {verdict.rule}" in said
    assert "looks like: a cache: the test's first sample took 0.01 s" in said


def test_the_reference_is_the_newest_valid_run_of_the_same_setup(tmp_path: Path) -> None:
    def make(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "recipe.yaml").write_text(changes.pop("recipe", "name: tiny\n"))
        scenario = changes.pop("scenario", "offline")
        result = run_folders.result(scenario, "performance", **{"commit": "c", **changes})
        (folder / "result.json").write_text(json.dumps(result))
        return folder

    fitting = {"scenario": "offline", "recipe_yaml": "name: tiny\n", "commit": "c"}
    with pytest.raises(BadInput, match="no VALID offline performance run"):
        compliance.find_reference(tmp_path, None, **fitting)
    make("20260101-000000-offline-performance")
    right = make("20260102-000000-offline-performance")
    make("20260103-000000-offline-performance", valid=False)
    make("20260104-000000-offline-performance", commit="d")
    make("20260105-000000-offline-performance", recipe="name: other\n")
    make("20260106-000000-offline-test04", compliance=run_folders.audit_outcome("x"))
    other = make("20260107-000000-singlestream-performance", scenario="singlestream")
    (tmp_path / "latest").symlink_to(other.name)
    assert compliance.find_reference(tmp_path, None, **fitting) == right
    assert compliance.find_reference(tmp_path, str(right), **fitting) == right
    for folder, says in ((other, "not a performance run of offline"), (tmp_path, "not a finished run")):
        with pytest.raises(BadInput, match=says):
            compliance.find_reference(tmp_path, str(folder), **fitting)


def test_flags_that_do_not_go_together() -> None:
    with pytest.raises(BadInput, match="--test04 with --mode 'accuracy'"):
        run.parse(["--test04", "--mode", "accuracy"])
    with pytest.raises(BadInput, match="--reference 'x' has no effect"):
        run.parse(["--reference", "x"])
