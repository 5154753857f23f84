"""Runs MLCommons LoadGen: makes a test from scenario, mode and user.conf, and reads LoadGen's logs of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import mlperf_loadgen as lg

from sut import user_conf
from sut.result import Mode, Scenario
from sut.user_conf import MODEL
from wan_mlperf.errors import Failed, choose
from wan_mlperf.files import in_memory

SCENARIOS: dict[Scenario, str] = {"singlestream": "SingleStream", "offline": "Offline"}
MODES = ("performance", "accuracy")


def make_settings(scenario: Scenario, mode: Mode, conf: Path, samples: int) -> Any:
    """Return LoadGen's TestSettings for this scenario and mode; `samples` is the number of prompts. Raises BadInput."""
    name = SCENARIOS[choose("scenario", scenario, SCENARIOS)]
    choose("mode", mode, MODES)
    lines = user_conf.read(conf).lines
    settings = lg.TestSettings()
    with in_memory("".join(f"{line}\n" for line in lines).encode()) as file:
        settings.FromConfig(str(file), MODEL, name)
    settings.scenario = getattr(lg.TestScenario, name)
    settings.mode = lg.TestMode.AccuracyOnly if mode == "accuracy" else lg.TestMode.PerformanceOnly
    if samples < settings.performance_sample_count_override:
        settings.performance_sample_count_override = samples  # a shorter list than the benchmark's
    return settings


def run(
    settings: Any,
    *,
    folder: Path,
    samples: int,
    issue: Callable[[Sequence[Any]], None],
    flush: Callable[[], None],
    audit: Path | None = None,
) -> None:
    """Run one test: LoadGen calls `issue` with samples and writes its logs to `folder`. Raises Failed if a log is incomplete.

    `audit` is MLCommons' audit.config of a compliance test. An audit.config in the working directory is never read.
    """
    count = min(samples, settings.performance_sample_count_override or samples)
    library = lg.ConstructQSL(samples, count, _nothing, _nothing)
    system = lg.ConstructSUT(issue, flush)
    output = lg.LogOutputSettings()
    output.outdir = str(folder)
    output.copy_summary_to_stdout = False
    logs = lg.LogSettings()
    logs.log_output = output
    logs.enable_trace = False
    try:
        lg.StartTestWithLogSettings(system, library, settings, logs, str(audit) if audit else str(folder / "no-audit.config"))
    finally:
        lg.DestroySUT(system)
        lg.DestroyQSL(library)
    _check_whole(folder, accuracy=settings.mode == lg.TestMode.AccuracyOnly)


def _check_whole(folder: Path, *, accuracy: bool) -> None:
    """Raise Failed if a log is incomplete: LoadGen itself does not notice a full disk."""
    file = folder / ("mlperf_log_accuracy.json" if accuracy else "mlperf_log_detail.txt")
    try:
        with file.open("rb") as stream:
            stream.seek(-min(64, file.stat().st_size), 2)
            tail = stream.read().strip()
    except OSError as error:
        raise Failed(f"LoadGen left no {file.name} in {folder} ({error.strerror}): is the disk full?") from None
    if not tail.endswith(b"]" if accuracy else b"}"):
        raise Failed(f"LoadGen's {file.name} in {folder} is incomplete: is the disk full?")


def read_detail(folder: Path) -> dict[str, Any]:
    """Return LoadGen's detail log as key -> last value. Raises Failed if there is none."""
    file = folder / "mlperf_log_detail.txt"
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise Failed(f"LoadGen left no {file.name} in {folder} ({error.strerror})") from None
    return dict(_entries(lines))


def _entries(lines: Iterable[str]) -> Iterable[tuple[str, Any]]:
    for line in lines:
        if line.startswith(":::MLLOG "):
            entry = json.loads(line.removeprefix(":::MLLOG "))
            yield entry["key"], entry["value"]


def _nothing(_samples: Sequence[int]) -> None:
    """Stand for LoadGen's load and unload hooks: the prompts are in memory already."""
