"""What `submit run` prints: the stages and how long they may take, why one failed, what a dry run does not have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from sut import compliance, loadgen, pace, prompts
from sut.result import Mode, Scenario
from sut.test04_reasons import Spread
from wan_mlperf import cli, process
from wan_mlperf.submit import client, requirements
from wan_mlperf.submit.campaign import Campaign, Stage, State, speed


def show(campaign: Campaign, user_confs: Mapping[Scenario, Path]) -> None:
    """Print every stage: done or left, what is known of it, and how long it may take."""
    table = Table(title=f"campaign {campaign.folder}")
    for heading in ("stage", "state", "", "estimate"):
        table.add_column(heading)
    for stage in campaign.stages():
        state: State = campaign.state(stage)
        seconds = None if state.done else estimate(campaign, stage, user_confs)
        table.add_row(str(stage), "done" if state.done else "left", state.note, "" if state.done else duration(seconds))
    cli.console(width=110).print(table)


def estimate(campaign: Campaign, stage: Stage, user_confs: Mapping[Scenario, Path]) -> float | None:
    """Seconds that a stage may take, or None without a finished run to tell from."""
    known = None if stage.kind == "vbench" else speed(campaign, stage)
    if known is None:
        return None
    start_s, each_s = known
    scenario = stage.scenario
    if campaign.harness == "endpoints":
        return start_s + each_s * client.expected(scenario, stage.kind, dry_run=campaign.dry_run)
    mode: Mode = "accuracy" if stage.kind == "accuracy" else "performance"
    count, conf = len(prompts.benchmark_prompts()), user_confs[stage.scenario]
    settings = loadgen.make_settings(scenario, mode, conf, count)
    rate = None if pace.is_stated(conf) or not each_s else pace.Rate(per_second=1 / each_s, source="a finished run")
    audit = compliance.AUDIT if stage.kind == "test04" else None
    seconds = each_s * pace.expected_queries(settings, scenario, mode, count, audit=audit, rate=rate)
    return start_s + (seconds if mode == "accuracy" else max(seconds, settings.min_duration_ms / 1e3))


def duration(seconds: float | None) -> str:
    """A time for people: 90 s, 12 min, 2 h 05 min."""
    if seconds is None:
        return "not known yet"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def explain_failure(state: State) -> None:
    """Say what a failed TEST04 looks like, and what to do about it."""
    outcome = state.result.compliance if state.result else None
    if state.result is None or outcome is None or outcome.passed:
        return
    for name, seconds in (("performance run", outcome.reference_seconds), ("TEST04", state.result.sample_seconds)):
        if seconds:
            process.tell(f"  {name}: {Spread.of(seconds)}")
    for reason in outcome.reasons:
        process.tell(f"  looks like {reason}")
    process.tell(f"  rule: {outcome.rule}")
    process.tell(f"  to measure again: the same command with --again {state.result.scenario}-performance")


def show_missing(campaign: Campaign) -> None:
    """List what a finished dry run does not have for the closed division."""
    states = {stage: campaign.state(stage) for stage in campaign.stages()}
    missing = requirements.listed(requirements.of_campaign(campaign, states, "closed"))
    notes = requirements.as_notes([one for one in missing if not one.hard])
    for line in ("this is a dry run; for the closed division:", *(f"- {note}" for note in notes)):
        process.tell(line)
