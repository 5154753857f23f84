"""Run folders -> the HTML of one run's report, or of the comparison of two."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from pydantic import TypeAdapter, ValidationError

from sut.result import Result
from wan_mlperf.errors import BadInput
from wan_mlperf.pages import charts, template
from wan_mlperf.pages.charts import NONE
from wan_mlperf.published import Published, published
from wan_mlperf.vbench.summary import Summary
from wan_mlperf.video import read_mp4

HERE = Path(__file__).parent
VIDEOS, FRAMES = 4, 4  # in a contact sheet
STAGES = {
    "text_encode": "text encoder",
    "denoise_high": "denoising, high-noise expert",
    "denoise_low": "denoising, low-noise expert",
    "vae_decode": "VAE decoder",
    "to_host": "copy to host",
    "respond": "response to LoadGen",
}


@dataclass(frozen=True)
class _Video:
    prompt: str
    video: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder's content: the result, the recipe as plain values (`settings`), and VBench's summary if it was scored."""

    folder: Path
    result: Result
    settings: Mapping[str, object]
    vbench: Summary | None


def render(run: Run) -> str:
    """Return the page of one run."""
    result, times = run.result, run.result.sample_seconds
    marks = {"90th percentile": result.latency_p90_s, "early-stopping estimate": result.latency_early_stopping_s}
    stages = {STAGES.get(name, name): value for name, value in result.spans.items()}
    pair = [result.compliance.reference_seconds, times] if result.compliance and result.compliance.reference_seconds else None
    return template(HERE, "run.html").render(
        run=result,
        vbench=run.vbench,
        title=_title(run.result),
        made=_date(run.folder.name),
        verdict=_verdict(run.result),
        figures=_figures(result, run.vbench),
        marks={name: value for name, value in marks.items() if value is not None},
        histogram=charts.histogram([times], marks) if times else None,
        over_run=charts.over_run([times], result.latency_p90_s) if times else None,
        both_tests=charts.histogram(pair) if pair else None,
        both_over_run=charts.over_run(pair) if pair else None,
        stages=stages,
        predicted={STAGES[name]: value for name, value in result.prediction.stages.items()} if result.prediction else {},
        shares=charts.shares(stages),
        published=_published(result),
        videos=_contact_sheet(run.folder) if result.mode == "accuracy" else [],
        environment=_environment(result),
    )


def render_comparison(first: Run, second: Run) -> str:
    """Return the page that compares two runs."""
    pair = (first, second)
    times = [run.result.sample_seconds for run in pair]
    stages = [(label, first.result.spans.get(name), second.result.spans.get(name)) for name, label in STAGES.items()]
    return template(HERE, "compare.html").render(
        runs=[run.result for run in pair],
        title="Two runs compared",
        names=[run.folder.name for run in pair],
        titles=[_title(run.result) for run in pair],
        verdicts=[_verdict(run.result) for run in pair],
        rows=_rows(first, second),
        stages=[(label, a, b, _change(a, b)) for label, a, b in stages],
        histogram=charts.histogram(times) if all(times) else None,
        over_run=charts.over_run(times) if all(times) else None,
        recipe=_differences(_flat(first.settings), _flat(second.settings)),
        environment=_differences(_environment(first.result), _environment(second.result)),
    )


def _title(run: Result) -> str:
    scenario = {"singlestream": "SingleStream", "offline": "Offline"}[run.scenario]
    return f"{scenario}, {'TEST04' if run.compliance else run.mode}"


def _date(name: str) -> str:
    try:
        return f"{datetime.strptime(name[:15], '%Y%m%d-%H%M%S'):%d %B %Y, %H:%M}"
    except ValueError:
        return name


def _verdict(run: Result) -> tuple[bool, str, str]:
    """Return whether all is well, the word for it, and the reason if there is one."""
    if not run.valid:
        return False, "INVALID", run.invalid_reason or "LoadGen gives no reason"
    if run.compliance:
        passed = run.compliance.passed
        return passed, "TEST PASS" if passed else "TEST FAIL", run.compliance.verdict.partition(": ")[2]
    return True, "VALID", ""


def _figures(run: Result, vbench: Summary | None) -> list[tuple[str, str, str]]:
    """Return the numbers at the top: value, name, note."""
    figures = []
    if run.latency_p90_s:
        early = run.latency_early_stopping_s
        figures.append((charts.seconds(early), "SingleStream score", "early-stopping estimate of the 90th percentile"))
        figures.append((charts.seconds(run.latency_p90_s), "90th percentile", "of the latencies as measured"))
        figures.append((charts.seconds(run.latency_mean_s), "mean latency", ""))
    if run.samples_per_second:
        figures.append((f"{run.samples_per_second:.4f}", "samples per second", "the Offline score"))
        figures.append((charts.seconds(run.generate_mean_s), "mean time per sample", "of one replica"))
    if vbench is not None and vbench.score is not None:
        figures.append((f"{vbench.score:.2f}", "VBench", f"the floor is {vbench.floor}"))
    if not figures:
        figures.append((charts.seconds(run.generate_mean_s), "mean time per video", "without writing the MP4"))
    return [*figures, (str(run.queries), "samples", f"on {run.world_size} rank{'s' * (run.world_size != 1)}")]


def _published(run: Result) -> list[tuple[Published, float | None]]:
    """The published results with how much faster this run is than each, for the benchmark's own workload.

    Like is compared with like: the endpoints harness scores the mean, so our mean is set against it, and our early-stopping
    estimate against LoadGen's.
    """
    if not run.workload_is_mlperf:
        return []
    rate = run.samples_per_second
    ours = {"loadgen": run.latency_early_stopping_s, "endpoints": run.latency_mean_s}
    rows = []
    for row in published():
        latency = ours[row.harness]
        ratio = row.score_s / latency if latency else rate / row.samples_per_second if rate and row.samples_per_second else None
        rows.append((row, ratio))
    return rows


def _contact_sheet(folder: Path) -> list[tuple[str, list[str]]]:
    """Return a few videos spread over the run: the prompt, and frames as data URLs. Raises OSError or BadInput."""
    file = folder / "prompts.json"
    try:
        entries = TypeAdapter(list[_Video]).validate_json(file.read_bytes())
    except ValidationError as error:
        raise BadInput(f"{str(file)!r}: not a list of videos ({error.errors()[0]['msg']}); allowed: an accuracy run's") from None
    there = [entry for entry in entries if (folder / entry.video).is_file()]
    chosen = [there[index] for index in sorted(set(np.linspace(0, len(there) - 1, VIDEOS).astype(int)))] if there else []
    sheet = []
    for entry in chosen:
        try:
            video = read_mp4(folder / entry.video)
        except ValueError as error:
            raise BadInput(f"{error}; allowed: the videos of a finished accuracy run") from None
        frames = video[np.linspace(0, len(video) - 1, FRAMES).round().astype(int)]
        shrink = max(1, video.shape[2] // 320)
        kind = "png" if video.shape[2] <= 160 else "jpeg"
        pictures = [imageio.imwrite("<bytes>", frame[::shrink, ::shrink], extension=f".{kind}") for frame in frames]
        sheet.append((entry.prompt, [f"data:image/{kind};base64,{base64.b64encode(one).decode()}" for one in pictures]))
    return sheet


def _environment(run: Result) -> dict[str, str]:
    """Return what the run ran on and with, as one flat list."""
    names = ("recipe", "device", "mesh", "world_size", "checkpoint", "model_revision", "noise", "host", "commit")
    return {
        **{name.replace("_", " "): str(getattr(run, name)) for name in names},
        "kernels": ", ".join(f"{name}: {kernel}" for name, kernel in run.kernels.items()),
        "experts": "; ".join(run.experts),
        "division": "; ".join([run.division or "not recorded", *run.division_reasons]),
        "container": run.container,
        "start": charts.seconds(run.start_s),
        **run.versions,
        **{name.replace("_", " "): value for name, value in run.system.items()},
    }


def _rows(first: Run, second: Run) -> list[tuple[str, str, str, float | None]]:
    """Return the scores of both runs, and the change from the first to the second."""
    times = {
        "latency_early_stopping_s": "early-stopping estimate",
        "latency_p90_s": "90th percentile",
        "latency_mean_s": "mean latency",
        "generate_mean_s": "mean time per sample",
        "start_s": "start-up",
    }
    rows = []
    for key, label in times.items():
        a, b = getattr(first.result, key), getattr(second.result, key)
        if a is not None or b is not None:
            rows.append((label, charts.seconds(a), charts.seconds(b), _change(a, b)))
    for label, (a, b) in (
        ("samples per second", (first.result.samples_per_second, second.result.samples_per_second)),
        ("VBench", (_score(first), _score(second))),
    ):
        if a or b:
            rows.append((label, f"{a:.4f}" if a else NONE, f"{b:.4f}" if b else NONE, _change(a, b)))
    rows.append(("samples", str(first.result.queries), str(second.result.queries), None))
    return rows


def _score(run: Run) -> float | None:
    return None if run.vbench is None else run.vbench.score


def _change(before: float | None, after: float | None) -> float | None:
    return after / before - 1 if before and after else None


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)})
    return flat


def _differences(first: Mapping[str, str], second: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Return what differs: name, first value, second value."""
    names = dict.fromkeys([*first, *second])
    return [(name, first.get(name, NONE), second.get(name, NONE)) for name in names if first.get(name) != second.get(name)]
