"""How much work LoadGen prepares for a performance test, and why too little of it ends INVALID.

LoadGen decides before the first query how many there can be. SingleStream: twice what 600 s need at `target_latency`; without
that line LoadGen assumes 10 ms, which is enough for any system. Offline: 1.1 times what 600 s need at `target_qps`, and at least
`min_query_count`. All of them are made, so too few end INVALID and too many cost time. If user.conf does not have that line, the
target therefore comes from a measured rate. Source: LoadGen's test_settings_internal.cc and issue_query_controller.cc.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sut import loadgen, user_conf
from wan_mlperf.files import atomic_write

SLACK = 1.1  # LoadGen's own
MARGIN = 1.5  # how much faster than its last warm-up a system may turn out to be


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Samples per second of the whole system, and where the number comes from."""

    per_second: float
    source: str


def offline_samples(settings: Any, *, least: int | None = None, rate: Rate | None = None) -> int:
    """Number of samples that LoadGen asks for in Offline. `least` replaces min_query_count; `rate` is what `aim` would get."""
    target = settings.offline_expected_qps if rate is None else MARGIN * rate.per_second
    wanted = int(SLACK * settings.min_duration_ms / 1e3 * target)
    return max(settings.min_query_count if least is None else least, wanted)


def expected_queries(
    settings: Any,
    scenario: loadgen.Scenario,
    mode: loadgen.Mode,
    samples: int,
    *,
    audit: Path | None = None,
    rate: Rate | None = None,
) -> int:
    """Return the least number of samples that the test will ask for. LoadGen itself reads the `audit` file later.

    `rate` is what `aim` will get, if that is known before the run.
    """
    if mode == "accuracy":
        return samples
    least = settings.min_query_count
    if audit is not None:
        least = int(user_conf.read(audit).values.get(f"{loadgen.SCENARIOS[scenario]}.min_query_count", least))
    return offline_samples(settings, least=least, rate=rate) if scenario == "offline" else max(1, least)


def is_stated(conf: Path) -> bool:
    """True if a user.conf sets Offline's target itself."""
    return not {"Offline.target_qps", "*.target_qps"}.isdisjoint(user_conf.read(conf).values)


def matters(settings: Any, scenario: loadgen.Scenario, mode: loadgen.Mode) -> bool:
    """True for a test whose number of samples depends on Offline's target."""
    return scenario == "offline" and mode == "performance" and settings.min_duration_ms > 0


def aim(settings: Any, conf: Path, rate: Rate) -> str:
    """Set Offline's target for a system of this `rate`, in `settings` and in the run folder's user.conf. Returns a line about it.

    If user.conf states a target, that one stays, and the line says whether it is too low.
    """
    shown = f"{rate.per_second:.4g} samples/s ({rate.source})"
    if is_stated(conf):
        seconds = offline_samples(settings) / rate.per_second
        if seconds * 1e3 >= settings.min_duration_ms:
            return f"target_qps {settings.offline_expected_qps:g}, as user.conf states, for {shown}"
        return (
            f"warning: target_qps {settings.offline_expected_qps:g}, as user.conf states, is too low for {shown}: the test "
            f"would end INVALID after {seconds:.0f} s; leave the line out, or state {MARGIN * rate.per_second:.4g}"
        )
    target = float(f"{MARGIN * rate.per_second:.4g}")
    settings.offline_expected_qps = target
    line = f"# By the run itself: {MARGIN} times {shown}.\n*.Offline.target_qps = {target}\n"
    atomic_write(conf, f"{conf.read_text(encoding='utf-8').rstrip()}\n{line}")
    return f"target_qps {target:g}, {MARGIN} times {shown}"


def explain(detail: Mapping[str, Any]) -> str | None:
    """Say what to change if LoadGen's detail log shows a test that ran out of work. None for any other outcome."""
    if detail.get("result_validity") == "VALID" or detail.get("result_min_duration_met") is not False:
        return None
    need_s = detail["effective_min_duration_ms"] / 1e3
    if detail.get("effective_scenario") == "Offline":
        samples, rate = detail["effective_samples_per_query"], detail.get("result_samples_per_second") or 0.0
        if rate <= 0:
            return None
        return (
            f"LoadGen asked for {samples} samples, done in {samples / rate:.4g} s of the {need_s:g} s that a test must take: "
            f"target_qps {detail['requested_offline_expected_qps']:g} is below the {rate:.4g} samples/s reached. If user.conf "
            f"states it, take the line out, or set *.Offline.target_qps = {MARGIN * rate:.4g}; if the run set it by a rate that "
            "was measured before, the machine was slower then: measure that again"
        )
    if "Ran out of generated queries" not in str(detail.get("error_runtime", "")):
        return None
    queries, mean_s = detail["result_query_count"], detail["result_mean_latency_ns"] / 1e9
    expected_ms = detail["requested_single_stream_expected_latency_ns"] / 1e6
    return (
        f"LoadGen generated only {queries} queries ahead, done in {queries * mean_s:.4g} s of the {need_s:g} s that a test must "
        "take: "
        f"target_latency {expected_ms:g} ms is above twice the {1e3 * mean_s:.4g} ms reached. Take the line out of user.conf"
    )
