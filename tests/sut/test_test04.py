"""TEST04 of the whole job on two ranks: the honest pipeline does all of the work again, one that caches by sample fails."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SMALL, run_module


def start(module: str, outputs: Path, model: Path, conf: Path, *words: str, ranks: int | None = None) -> dict[str, Any]:
    """Run once; return the newest result.json, with the exit code under "code"."""
    own = [f"--set=user_conf={conf}", "--set=mesh.ranks=2", "--set=warmup_queries=1", "--model", str(model)]
    done = run_module([module, "--scenario", "singlestream", "--outputs", str(outputs), *own, *SMALL, *words], ranks=ranks)
    assert done.returncode in (0, 1), done.stderr
    result: dict[str, Any] = json.loads((outputs / "latest" / "result.json").read_text())
    return {**result, "code": done.returncode}


@pytest.mark.slow  # tests/sut/test_compliance.py holds the rule against the real LoadGen in seconds
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "skipped", [[], ["--set=workload.steps=5", "--set=reuse.steps=[4]", "--set=guidance.off=[3,4]"]], ids=["all steps", "reuse"]
)
def test_honest_works_and_a_cache_fails(tmp_path: Path, model: Path, skipped: list[str]) -> None:
    """Work that the plan skips within a query is skipped in every query alike."""
    conf = tmp_path / "user.conf"
    conf.write_text("*.SingleStream.min_query_count = 160\n*.SingleStream.min_duration = 0\n")
    outputs = tmp_path / "outputs"

    normal = start("wan_mlperf.run", outputs, model, conf, *skipped)
    assert normal["valid"] and normal["code"] == 0 and "compliance" not in normal
    audit = start("wan_mlperf.run", outputs, model, conf, *skipped, "--test04")
    compliance = audit["compliance"]
    assert audit["valid"] and compliance["test"] == "TEST04"
    # Whether the two are within the rule's 20 % (SingleStream up to 200 queries/s) is this machine's affair; the verdict is what
    # follows from their scores.
    assert compliance["passed"] == (compliance["test_score"] / compliance["reference_score"] < 1.2)
    assert audit["code"] == (0 if compliance["passed"] else 1)
    word = "TEST PASS" if compliance["passed"] else "TEST FAIL"
    folder = (outputs / "latest").resolve()
    assert folder.name.endswith("-singlestream-test04")
    assert (folder / "verify_performance.txt").read_text().splitlines()[-1].startswith(word)
    assert word in (folder / "report.html").read_text()
    assert statistics.median(audit["sample_seconds"]) > 0.2 * statistics.median(normal["sample_seconds"])
    assert len(normal["sample_seconds"]) == normal["queries"] and normal["prompts_are_mlperf"]
    assert [step["source"] for step in normal["plan"]] == ([None, None] if not skipped else [None, None, None, None, 3])
    assert {one["plan"][-1]["source"] for one in (normal, audit)} == {3 if skipped else None}

    cached = start("tests.sut.caching_run", outputs, model, conf, *skipped, "--test04", ranks=2)
    # A busy machine can delay what takes no time. How fast it was shows in the middle; the verdict again follows from the scores.
    assert statistics.median(cached["sample_seconds"]) < 0.5 * statistics.median(normal["sample_seconds"])
    found = cached["compliance"]
    assert cached["valid"] and found["passed"] == (found["test_score"] / found["reference_score"] < 1.2)
    assert found["passed"] or ("faster" in found["verdict"] and cached["code"] == 1)
    assert found["reference"] == compliance["reference"]
