"""Everything that keeps a campaign from being submitted, in one list: what the rules ask for and what MLCommons' checker reads.

Sources: MLCommons inference_rules, and tools/submission/submission_checker for v6.1.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sut import accuracy_log, loadgen
from sut.result import Result
from wan_mlperf.checkpoint import HUB_REVISION
from wan_mlperf.errors import Failed
from wan_mlperf.submit import client_results, system_description
from wan_mlperf.submit.campaign import Campaign, Stage, State

DURATION_MS = 600_000  # of a performance run, in every division
SINGLESTREAM_QUERIES = 64  # below, LoadGen gives no early-stopping estimate
OFFLINE_SAMPLES = 248
ACCURACY_SAMPLES = 248
AUDIT_VIDEOS = (130, 106, 84, 59, 12, 123, 43, 22, 238, 32)  # of round v6.1
PERFORMANCE_SAMPLES = 50  # different samples that a performance run draws from
SEEDS = {
    "effective_qsl_rng_seed": 2085463073848966840,
    "effective_sample_index_rng_seed": 2747215439041700203,
    "effective_schedule_rng_seed": 16159082839903944936,
}
# The endpoints client's names for two of them.
CLIENTS_SEEDS = {
    "scheduler_random_seed": "effective_schedule_rng_seed",
    "dataloader_random_seed": "effective_sample_index_rng_seed",
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is missing, and the stages that lack it.

    `seen`: MLCommons' checker refuses it; else only the rules, and an audit, do. `hard`: without it there is no tree to build.
    """

    what: str
    stages: tuple[str, ...] = ()
    seen: bool = True
    hard: bool = False

    def __str__(self) -> str:
        return f"{', '.join(self.stages)}: {self.what}" if self.stages else self.what


def listed(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems with equal ones of several stages merged."""
    merged: dict[str, Problem] = {}
    for one in problems:
        known = merged.get(one.what)
        stages = (*known.stages, *one.stages) if known else one.stages
        merged[one.what] = dataclasses.replace(
            one, stages=tuple(dict.fromkeys(stages)), hard=one.hard or bool(known and known.hard)
        )
    return list(merged.values())


def as_notes(problems: Sequence[Problem]) -> list[str]:
    """What a dry run does not have, in lines for a person: first what MLCommons' checker will refuse."""
    seen = [f"MLCommons' checker will refuse: {one}" for one in problems if one.seen]
    return [*seen, *(f"the rules ask for more: {one}" for one in problems if not one.seen)]


def of_campaign(campaign: Campaign, states: Mapping[Stage, State], division: str) -> list[Problem]:
    """Return what the stages of a campaign lack for a division."""
    found = []
    if division == "closed":
        absent = [one for one in loadgen.SCENARIOS if one not in campaign.recipes]
        found += [Problem(what=f"the closed division asks for {one}, too") for one in absent]
    for stage, state in states.items():
        if not state.done:
            found.append(_of(stage, state.note, hard=True))
        elif stage.kind == "vbench":
            found += _score(stage, state, division)
        elif state.result is not None and state.run is not None:
            judge = _client_run if campaign.harness == "endpoints" else _run
            found += judge(stage, state.result, state.run, division)
    done = [state.result for stage, state in states.items() if state.done and state.result and stage.kind != "vbench"]
    return found + _one_system(done)


def _run(stage: Stage, result: Result, run: Path, division: str) -> list[Problem]:
    try:
        detail = loadgen.read_detail(run)
    except Failed as error:
        return [_of(stage, str(error), hard=True)]
    found = [_of(stage, what) for what in _log(stage, detail)]
    found += [_of(stage, what, seen=False) for what in _counts(stage, detail)]
    found += [_of(stage, what, seen=False) for what in _rules(result, division)]
    if stage.kind == "accuracy":
        found += [_of(stage, what, hard=True) for what in _kept(run)]
    return found


def _client_run(stage: Stage, result: Result, run: Path, division: str) -> list[Problem]:
    """Like `_run`, for a run of the endpoints client, which also made the accuracy run's videos."""
    duration, least = DURATION_MS // 1000, OFFLINE_SAMPLES if stage.scenario == "offline" else SINGLESTREAM_QUERIES
    seeds = {own: SEEDS[name] for own, name in CLIENTS_SEEDS.items()}
    log = client_results.log_problems(run, duration_s=duration, seeds=seeds, samples=ACCURACY_SAMPLES)
    found = [_of(stage, what) for what in log]
    rules = client_results.rule_problems(run, duration_s=duration, samples=least)
    found += [_of(stage, what, seen=False) for what in rules]
    found += [_of(stage, what, seen=False) for what in _rules(result, division)]
    return found + [_of(stage, what, hard=True) for what in _videos(run)]


def _of(stage: Stage, what: str, *, seen: bool = True, hard: bool = False) -> Problem:
    return Problem(what=what, stages=(str(stage),), seen=seen, hard=hard)


def _score(stage: Stage, state: State, division: str) -> list[Problem]:
    if state.vbench is None:
        return [_of(stage, state.note, seen=division == "closed")]
    if division != "closed":
        return []  # whatever it is, it only has to be reported
    return [
        *([] if state.vbench.reached else [_of(stage, state.note)]),
        *(_of(stage, problem, seen=False) for problem in state.vbench.problems),
    ]


def _videos(run: Path) -> list[str]:
    """The audit videos that an accuracy run's folder has lost."""
    try:
        entries = {entry["index"]: entry for entry in json.loads((run / "prompts.json").read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, KeyError):
        return [f"{run.name}: prompts.json cannot be read: make the run again"]
    absent = [index for index in AUDIT_VIDEOS if index not in entries or not (run / entries[index]["video"]).is_file()]
    return [f"audit video {', '.join(map(str, absent))} is not there: make the run again"] if absent else []


def _kept(run: Path) -> list[str]:
    """What an accuracy run's folder has lost, or what was changed in it."""
    found = _videos(run)
    if not (run / accuracy_log.NAME).is_file():
        return [*found, f"{accuracy_log.NAME} is not there: make the run again"]
    if (run / "accuracy.txt").is_file():
        digest = f"hash={accuracy_log.whole_sha256(run)}"
        lines = (run / "accuracy.txt").read_text(encoding="utf-8").splitlines()
        found += [
            f"{line} in accuracy.txt is not that of {accuracy_log.NAME}: score the run again"
            for line in lines
            if line.startswith("hash=") and line != digest
        ]
    return found


def _log(stage: Stage, detail: Mapping[str, object]) -> list[str]:
    """What LoadGen's detail log of a run lacks."""
    found = []
    if stage.kind == "accuracy":
        samples = detail.get("effective_accuracy_sample_count", 0)
        if samples != ACCURACY_SAMPLES:
            found.append(f"{samples} accuracy samples; allowed: {ACCURACY_SAMPLES}")
    else:
        found += _performance_log(detail)
    if stage.kind != "test04":
        for name, seed in SEEDS.items():
            if detail.get(name) != seed:
                found.append(f"{name.removeprefix('effective_')} is {detail.get(name)}; allowed: {seed}, that of v6.1")
    return found


def _performance_log(detail: Mapping[str, Any]) -> list[str]:
    found = []
    duration = detail.get("effective_min_duration_ms", 0)
    if duration < DURATION_MS:
        found.append(f"min_duration is {duration / 1e3:g} s; allowed: {DURATION_MS // 1000} s or more")
    different = detail.get("effective_performance_sample_count", 0)
    if different < PERFORMANCE_SAMPLES:
        found.append(f"performance sample count {different}; allowed: {PERFORMANCE_SAMPLES} or more")
    return found


def _counts(stage: Stage, detail: Mapping[str, Any]) -> list[str]:
    """What the rules ask of LoadGen's counts and the checker does not look at: queries, samples, errors."""
    found = []
    queries, samples = detail.get("result_query_count", 0), detail.get("effective_samples_per_query", 0)
    if stage.scenario == "singlestream" and stage.kind != "accuracy" and queries < SINGLESTREAM_QUERIES:
        found.append(f"{queries} queries; allowed: {SINGLESTREAM_QUERIES} or more")
    if (stage.scenario, stage.kind) == ("offline", "performance") and samples < OFFLINE_SAMPLES:
        found.append(f"{samples} samples; allowed: {OFFLINE_SAMPLES} or more")
    if stage.kind != "test04" and detail.get("num_errors"):
        found.append(f"{detail['num_errors']} errors in LoadGen's log")
    return found


def _rules(result: Result, division: str) -> list[str]:
    """What a run's result.json shows that LoadGen's log does not."""
    found = []
    if not result.workload_is_mlperf:
        found.append("its workload is not the benchmark's")
    if not result.prompts_are_mlperf:
        found.append("its prompts are not the benchmark's")
    if division != "closed":
        return found
    # A wrong workload is already reported above, for open runs, too.
    found += [reason for reason in result.division_reasons if not reason.startswith("workload:")]
    if result.checkpoint != "embedded" and result.model_revision not in ("unknown", HUB_REVISION):
        found.append(f"model revision {result.model_revision}; allowed: {HUB_REVISION}")
    ecc = result.system.get("ecc", "unknown")
    if ecc.partition(":")[0] == "off":
        found.append(f"ECC is {ecc}; allowed: on, see `python -m wan_mlperf.doctor`")
    return found


def _one_system(results: Sequence[Result]) -> list[Problem]:
    """Report if the runs are not all of one system."""
    fields = ("number_of_nodes", "accelerators_per_node", "accelerator_model_name", "host_processor_model_name")
    found = []
    for field in fields:
        values = list(dict.fromkeys(str(result.system.get(field, "?")) for result in results))
        if len(values) > 1:
            found.append(Problem(what=f"the runs are of different systems: {field} is {' and '.join(values)}", seen=False))
    return found


def of_description(description: Mapping[str, object], measured: Mapping[str, str], division: str) -> list[Problem]:
    """Where a person's description is empty or contradicts what ran, and what it has to say where the run could not tell."""
    found = []
    if empty := system_description.unfilled(description):
        # A dry run fills them with words, which the checker takes for all but these two.
        seen = not {"status", "system_type"}.isdisjoint(empty)
        found.append(Problem(what=f"system: to be filled in: {', '.join(empty)}", seen=seen))
    for field in ("number_of_nodes", "accelerators_per_node"):
        if field in measured and description[field] and str(description[field]) != str(measured[field]):
            found.append(Problem(what=f"system: {field} is {description[field]!r}, but {measured[field]!r} ran", seen=False))
    if division == "closed" and measured.get("ecc", "unknown").startswith("unknown"):
        words = " ".join(str(description[field]) for field in ("host_memory_configuration", "hw_notes", "sw_notes"))
        if "ECC" not in words:
            what = (
                f'system: whether ECC is on is {measured.get("ecc", "unknown")}; allowed: on, or the words "ECC enabled" in '
                "hw_notes, by someone who looked on the host"
            )
            found.append(Problem(what=what, seen=False))
    return found
