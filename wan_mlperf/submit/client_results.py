"""What MLCommons' endpoints client leaves in its report folder: read, taken into a campaign, judged and packed.

Its files (commit ea332753): config.yaml, performance/result_summary.json, accuracy/accuracy_results.json,
audit/audit_output_caching_test.json, events.jsonl, sample_idx_map.json, report.txt.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from sut import result as results
from sut import run_record
from sut.prompts import SHA256, digest
from sut.result import Result, Scenario
from wan_mlperf.files import atomic_write
from wan_mlperf.spans import STAGES
from wan_mlperf.submit.client import ACCURACY

SUMMARY, SCORES, CONFIG = "performance/result_summary.json", "accuracy/accuracy_results.json", "config.yaml"
AUDIT, AUDIT_FILE = "audit", "audit_output_caching_test.json"
HALVES = ("reference", "output_caching")
PERCENTILES = ("50", "90", "95", "97", "99")
# What goes from the report folder into the tree, next to what pack makes itself; as in v6.1's submissions.
PACKED = (CONFIG, SUMMARY, SCORES, "report.txt")


def read(file: Path) -> dict[str, Any]:
    """Return a JSON object that the client wrote; an empty one if the file is missing or incomplete."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def audit(run: Path) -> tuple[bool, str] | None:
    """Return the audit's verdict and its reason; None if there is none.

    The client also counts samples that failed, quickly as a rule, so an audit with such samples does not pass here.
    """
    found = read(run / AUDIT / AUDIT_FILE)
    if "passed" not in found:
        return None
    failed = sum(int(read(run / AUDIT / half / SUMMARY).get("n_samples_failed") or 0) for half in HALVES)
    return (found["passed"] is True, str(found.get("reason", ""))) if not failed else (False, f"{failed} samples failed")


def last_error(log: Path) -> str:
    """The last error in what the client printed, or else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.rpartition(" - ERROR - ")[2] for line in lines if " - ERROR - " in line]
    return f"{(errors or lines or ['it printed nothing'])[-1][:200]}; see {log}"


def mean_stages(metrics: str) -> dict[str, float]:
    """Mean seconds per stage of all videos that a server made, from its /metrics; `video` is the total."""

    def mean(name: str, label: str = "") -> float:
        parts = [re.search(rf"^wan_mlperf_{name}_{part}{re.escape(label)} (\S+)$", metrics, re.M) for part in ("sum", "count")]
        total, number = (float(one[1]) if one else 0.0 for one in parts)
        return total / number if number else 0.0

    return {**{stage: mean("stage_seconds", f'{{stage="{stage}"}}') for stage in STAGES}, "video": mean("video_seconds")}


def keep_videos(run: Path, prompts: Sequence[str]) -> int:
    """Move the accuracy run's videos to videos/INDEX.mp4, write prompts.json, and return how many there are.

    The client's own folder of links to them is removed: the links would lead nowhere.
    """
    index = read(run / "sample_idx_map.json").get(ACCURACY) or {}
    (run / "videos").mkdir(exist_ok=True)
    found = 0
    for event in _events(run):
        if event["event_type"] == "sample.complete" and event["sample_uuid"] in index and event["data"]:
            source = Path(event["data"][1] or "")
            if source.parent == run / "served" and source.is_file():
                shutil.move(source, run / "videos" / f"{index[event['sample_uuid']]}.mp4")
                found += 1
    run_record.write_prompts(run, prompts)
    shutil.rmtree(run / "vbench_videos", ignore_errors=True)
    fill_score(run, None)
    return found


def _events(run: Path) -> Iterator[dict[str, Any]]:
    """The client's log of what happened to each sample; a stopped run's last line may be half of one."""
    file = run / "events.jsonl"
    if file.is_file():
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    yield json.loads(line)


def fill_score(folder: Path, score: float | None) -> None:
    """Write VBench's score (0 to 100; None: there is none) into the client's accuracy results, where it was left open.

    The client writes the mean of the six dimensions as a fraction.
    """
    found = read(folder / SCORES)
    entries = [one for one in found.get("accuracy_scores", []) if one.get("dataset_name") == ACCURACY]
    if not entries:
        return
    value = None if score is None else score / 100
    entries[0]["score"] = value
    found.pop("average_accuracy", None)
    if value is not None:
        found = {"average_accuracy": value, **found}
    atomic_write(folder / SCORES, json.dumps(found, indent=2) + "\n")


def write_result(
    run: Path,
    made_by: Mapping[str, object],
    *,
    scenario: Scenario,
    prompts: Sequence[str],
    planned: int,
    videos: int,
    stages: Mapping[str, float],
    start_s: float,
    host: str,
    system: Mapping[str, str],
    stopped: str | None,
) -> Result:
    """Write result.json from the client's summary and from what the server says about itself; return it.

    `planned`: samples that the performance run had to issue; `videos`: those that the accuracy run has left.
    """
    summary = read(run / SUMMARY)
    seconds = (summary.get("duration_ns") or 0) / 1e9
    completed = int(summary.get("n_samples_completed") or 0)
    reason = stopped or _why_not(summary, planned=planned, videos=videos, expected=len(prompts))
    latency = summary.get("latency") or {}
    values: dict[str, object] = {
        **made_by,
        "scenario": scenario,
        "mode": "performance",
        "harness": "endpoints",
        "valid": reason is None,
        "invalid_reason": reason,
        "queries": completed,
        "prompts_are_mlperf": digest(prompts) == SHA256,
        "spans": {stage: stages.get(stage, 0.0) for stage in STAGES},
        "generate_mean_s": stages.get("video", 0.0),
        "start_s": start_s,
        "host": host,
        "system": dict(system),
        "samples_per_second": completed / seconds if scenario == "offline" and seconds else None,
    }
    if scenario == "singlestream" and latency:
        of, early = latency["percentiles"], latency.get("early_stopping_percentiles") or {}
        values["latency_mean_s"] = latency["avg"] / 1e9
        values["latency_p90_s"] = of["90.0"] / 1e9
        values["latency_early_stopping_s"] = early["90.0"] / 1e9 if early.get("90.0") else None
        values["latency_percentiles_s"] = {one: of[f"{one}.0"] / 1e9 for one in PERCENTILES}
    result = TypeAdapter(Result).validate_json(json.dumps(values))
    results.write(run, result)
    return result


def _why_not(summary: Mapping[str, Any], *, planned: int, videos: int, expected: int) -> str | None:
    """Why a run does not count, or None. The client itself ends with exit code 0 when samples have failed."""
    if not summary:
        return f"no {SUMMARY}"
    issued, completed, failed = (summary.get(f"n_samples_{what}") or 0 for what in ("issued", "completed", "failed"))
    if not summary.get("complete"):
        return f"the client ended in the state {summary.get('state')!r}"
    if failed or completed < issued or issued < planned:
        return f"{completed} of {planned} samples completed, {failed} failed"
    if videos < expected:
        return f"{videos} of {expected} videos of the accuracy run are there"
    return None


def log_problems(run: Path, *, duration_s: int, seeds: Mapping[str, int], samples: int) -> list[str]:
    """What MLCommons' checker refuses in the client's files of a run; `samples` are those of the accuracy run."""
    try:
        config = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
        runtime = config["settings"]["runtime"]
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        return [f"{CONFIG} cannot be read: make the run again"]
    found = []
    if (duration := runtime.get("min_duration_ms") or 0) < 1000 * duration_s:
        found.append(f"min_duration_ms is {duration}; allowed: {1000 * duration_s} or more")
    for name, seed in seeds.items():
        if runtime.get(name) != seed:
            found.append(f"{name} is {runtime.get(name)}; allowed: {seed}, that of v6.1")
    entries = [one for one in read(run / SCORES).get("accuracy_scores", []) if one.get("dataset_type", "accuracy") == "accuracy"]
    total = sum(int(one.get("total_samples") or 0) for one in entries)
    if total != samples:
        found.append(f"{total} accuracy samples; allowed: {samples}")
    return found


def rule_problems(run: Path, *, duration_s: int, samples: int) -> list[str]:
    """What only the rules ask for: enough samples, for long enough. The client itself does not ensure the duration."""
    summary = read(run / SUMMARY)
    seconds, issued = (summary.get("duration_ns") or 0) / 1e9, int(summary.get("n_samples_issued") or 0)
    found = []
    if seconds < duration_s:
        found.append(f"the performance run took {seconds:.0f} s; allowed: {duration_s} s or more")
    if issued < samples:
        found.append(f"{issued} samples; allowed: {samples} or more")
    return found


def pack(run: Path, place: Path, *, score: float | None) -> None:
    """Copy the client's files of a run into a scenario's folder of the tree, with VBench's score (0 to 100)."""
    for name in PACKED:
        if (run / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / name, place / name)
    fill_score(place, score)
    halves = [f"{half}/{name}" for half in HALVES for name in (CONFIG, SUMMARY, "report.txt")]
    for name in (AUDIT_FILE, "verify_OUTPUT_CACHING_TEST.txt", *halves):
        if (run / AUDIT / name).is_file():
            (place / AUDIT / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / AUDIT / name, place / AUDIT / name)


def version(run: Path) -> str:
    """The client's version and commit, as far as it knows them."""
    summary = read(run / SUMMARY)
    return " ".join(str(summary[name]) for name in ("version", "git_sha") if summary.get(name))
