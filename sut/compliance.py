"""TEST04, MLCommons' proof that nothing is cached: repeating one sample must not be much faster.

This benchmark does not ask for TEST01, which compares the responses of a performance run with those of the accuracy run. Its log
would be too large: fifty uncompressed videos are 11 GB, and twice that as LoadGen writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sut import loadgen, test04_reasons, user_conf
from sut import result as results
from sut.result import FILE, Compliance
from wan_mlperf.errors import BadInput
from wan_mlperf.files import atomic_write
from wan_mlperf.recipe import CONFIGS

AUDIT = CONFIGS / "mlperf" / "test04.config"
VERDICT = "verify_performance.txt"
# As verify_performance.py of MLCommons' TEST04 has it; its README says 10 % for every scenario.
FASTER = 0.10
FASTER_SINGLESTREAM = 0.20
LOW_THROUGHPUT = 200_000  # queries per second; a faster system is held to 10 % in SingleStream, too


@dataclass(frozen=True, kw_only=True)
class Score:
    """A performance run as TEST04 sees it. `value` is a rate, larger is faster, None if LoadGen gave no estimate."""

    scenario: str
    valid: bool
    same: bool
    value: float | None


def read_score(folder: Path) -> Score:
    """Read a run's score from LoadGen's detail log: 1e9 over the early-stopping estimate in ns, or Offline samples/s."""
    detail = loadgen.read_detail(folder)
    scenario = detail.get("effective_scenario", "")
    early = detail.get("early_stopping_latency_ss")
    return Score(
        scenario=scenario,
        valid=detail.get("result_validity") == "VALID",
        same=bool(detail.get("effective_performance_issue_same")),
        value=(1e9 / early if early else None) if scenario == "SingleStream" else detail.get("result_samples_per_second"),
    )


def limit_of(reference: Score) -> tuple[float, str]:
    """Return the limit (the test must be faster by less than this fraction), and the rule that sets it."""
    if reference.scenario == "SingleStream" and (reference.value or 0.0) <= LOW_THROUGHPUT:
        return FASTER_SINGLESTREAM, (
            f"less than {FASTER_SINGLESTREAM:.0%} faster: MLCommons' verify_performance.py for SingleStream up to "
            f"{LOW_THROUGHPUT:,} queries/s (its README: {FASTER:.0%})"
        )
    return FASTER, f"less than {FASTER:.0%} faster: MLCommons' verify_performance.py for {reference.scenario}"


def compare(reference: Score, test: Score) -> str:
    """Return "TEST PASS", or "TEST FAIL: " and why."""
    if not test.same or reference.same:
        return "TEST FAIL: the runs are not one with the audit file and one without"
    if reference.scenario != test.scenario:
        return f"TEST FAIL: the reference is {reference.scenario}, the test {test.scenario}"
    for name, score in (("reference", reference), ("test", test)):
        if not score.valid or not score.value:
            return f"TEST FAIL: the {name} run is INVALID"
    assert reference.value is not None and test.value is not None
    faster, (limit, _) = test.value / reference.value - 1, limit_of(reference)
    if faster >= limit:
        return f"TEST FAIL: one repeated sample is {faster:.1%} faster, allowed is less than {limit:.0%}"
    return "TEST PASS"


def verify(folder: Path, reference: Path, seconds: Sequence[float]) -> Compliance:
    """Judge a TEST04 run: write its verify_performance.txt as MLCommons' checker reads it; return what result.json keeps.

    `seconds`: what each of its samples took, in order; they are looked at if the test fails.
    """
    normal, same = read_score(reference), read_score(folder)
    line = compare(normal, same)
    limit, rule = limit_of(normal)
    before = results.read(reference).sample_seconds
    too_fast = normal.valid and same.valid and line != "TEST PASS"
    reasons = test04_reasons.reasons(before, seconds, limit=limit) if too_fast else []
    text = f"Verifying performance.\nreference score = {normal.value}\ntest score = {same.value}\nlimit: {rule}\n"
    atomic_write(folder / VERDICT, "".join([text, *(f"looks like: {reason}\n" for reason in reasons), f"{line}\n"]))
    return Compliance(
        test="TEST04",
        passed=line == "TEST PASS",
        verdict=line,
        reference=reference.name,
        reference_score=normal.value,
        test_score=same.value,
        rule=rule,
        reasons=tuple(reasons),
        reference_seconds=before,
    )


def check_samples(count: int) -> None:
    """Raise BadInput for a list of prompts too short to contain the one that the audit repeats."""
    least = int(user_conf.read(AUDIT).values["SingleStream.performance_issue_same_index"]) + 1
    if count < least:
        raise BadInput(f"--test04 with {count} prompts: it repeats prompt {least}; allowed: a list of at least {least}")


def find_reference(outputs: Path, named: str | None, *, scenario: str, recipe_yaml: str, commit: str) -> Path:
    """Return the performance run to compare with: the one named, else the newest in `outputs` that fits. Raises BadInput."""
    command = f"python -m wan_mlperf.run --scenario {scenario}"
    if named is not None:
        reason = _why_not(Path(named), scenario, recipe_yaml, commit)
        if reason:
            raise BadInput(
                f"--reference {named!r}: {reason}; allowed: a VALID performance run of {scenario} with this recipe and commit"
            )
        return Path(named)
    runs = sorted((file.parent for file in outputs.glob(f"*/{FILE}")), key=lambda run: run.name, reverse=True)
    reasons = []
    for run in runs:
        if run.is_symlink():
            continue
        reason = _why_not(run, scenario, recipe_yaml, commit)
        if reason is None:
            return run
        reasons.append(f" (the newest, {run.name}: {reason})")
    raise BadInput(
        f"--test04: no VALID {scenario} performance run with this recipe and commit in {str(outputs)!r}{''.join(reasons[:1])}; "
        f"allowed: {command} first, or --reference FOLDER"
    )


def _why_not(run: Path, scenario: str, recipe_yaml: str, commit: str) -> str | None:
    """Why a run cannot be the reference, or None."""
    try:
        result = results.read(run)
        recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
    except BadInput as error:
        return f"not a finished run: {error}"
    except (OSError, ValueError):
        return "not a finished run: recipe.yaml cannot be read"
    if result.scenario != scenario or result.mode != "performance" or result.compliance is not None:
        return f"not a performance run of {scenario}"
    if not result.valid:
        return "it is INVALID"
    if recipe != recipe_yaml:
        return "it is of another recipe"
    return None if result.commit == commit else f"its commit is {result.commit}, not {commit}"
