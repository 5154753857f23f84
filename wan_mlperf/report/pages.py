"""What a run folder tells -> the HTML of its report, or of the comparison of two."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np

from wan_mlperf.pages import charts, template
from wan_mlperf.pages.charts import NONE
from wan_mlperf.published import Published, published
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


def render(run: Mapping[str, Any]) -> str:
    """Return the page of one run."""
    times = run.get("sample_seconds") or []
    p90 = run.get("latency_p90_s") or None  # a run that was stopped has a 0
    marks = {"90th percentile": p90, "early-stopping estimate": run.get("latency_early_stopping_s")}
    stages = {STAGES.get(name, name): value for name, value in run.get("spans", {}).items()}
    return template(HERE, "run.html").render(
        run=run,
        title=_title(run),
        made=_date(run["folder"].name),
        verdict=_verdict(run),
        figures=_figures(run),
        marks={name: value for name, value in marks.items() if value is not None},
        histogram=charts.histogram([times], marks) if times else None,
        over_run=charts.over_run([times], p90) if times else None,
        stages=stages,
        shares=charts.shares(stages),
        published=_published(run),
        videos=_contact_sheet(run["folder"]) if run["mode"] == "accuracy" else [],
        environment=_environment(run),
    )


def render_comparison(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Return the page that compares two runs."""
    pair = (first, second)
    times = [list(run.get("sample_seconds") or []) for run in pair]
    stages = [(label, *(run.get("spans", {}).get(name) for run in pair)) for name, label in STAGES.items()]
    return template(HERE, "compare.html").render(
        runs=pair,
        title="Two runs compared",
        names=[run["folder"].name for run in pair],
        titles=[_title(run) for run in pair],
        verdicts=[_verdict(run) for run in pair],
        rows=_rows(first, second),
        stages=[(label, a, b, _change(a, b)) for label, a, b in stages],
        histogram=charts.histogram(times) if all(times) else None,
        over_run=charts.over_run(times) if all(times) else None,
        recipe=_differences(_flat(first["settings"]), _flat(second["settings"])),
        environment=_differences(_environment(first), _environment(second)),
    )


def _title(run: Mapping[str, Any]) -> str:
    scenario = {"singlestream": "SingleStream", "offline": "Offline"}.get(run["scenario"], run["scenario"])
    return f"{scenario}, {'TEST04' if run.get('compliance') else run['mode']}"


def _date(name: str) -> str:
    try:
        return f"{datetime.strptime(name[:15], '%Y%m%d-%H%M%S'):%d %B %Y, %H:%M}"
    except ValueError:
        return name


def _verdict(run: Mapping[str, Any]) -> tuple[bool, str, str]:
    """Whether all is well, the word, and the reason if there is one."""
    if not run["valid"]:
        return False, "INVALID", str(run.get("invalid_reason") or "LoadGen gives no reason")
    if run.get("compliance"):
        passed = bool(run["compliance"]["passed"])
        return passed, "TEST PASS" if passed else "TEST FAIL", str(run["compliance"]["verdict"]).partition(": ")[2]
    return True, "VALID", ""


def _figures(run: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The numbers at the top: value, what it is, a note."""
    figures = []
    if run.get("latency_p90_s"):
        early = run.get("latency_early_stopping_s")
        figures.append((charts.seconds(early), "SingleStream score", "early-stopping estimate of the 90th percentile"))
        figures.append((charts.seconds(run["latency_p90_s"]), "90th percentile", "of the latencies as measured"))
        figures.append((charts.seconds(run.get("latency_mean_s")), "mean latency", ""))
    if run.get("samples_per_second"):
        figures.append((f"{run['samples_per_second']:.4f}", "samples per second", "the Offline score"))
        figures.append((charts.seconds(run.get("generate_mean_s")), "mean time per sample", "of one replica"))
    if run["vbench"] and run["vbench"].get("score") is not None:
        figures.append((f"{run['vbench']['score']:.2f}", "VBench", f"the floor is {run['vbench']['floor']}"))
    if not figures:
        figures.append((charts.seconds(run.get("generate_mean_s")), "mean time per video", "without writing the MP4"))
    return [*figures, (str(run["queries"]), "samples", f"on {run['world_size']} rank{'s' * (run['world_size'] != 1)}")]


def _published(run: Mapping[str, Any]) -> list[tuple[Published, float | None]]:
    """The published results with how much faster this run is than each, for the benchmark's own workload.

    Like is compared with like: the endpoints harness scores the mean, so our mean is set against it, and our early-stopping
    estimate against LoadGen's.
    """
    if not run.get("workload_is_mlperf"):
        return []
    rate = run.get("samples_per_second")
    ours = {"loadgen": run.get("latency_early_stopping_s"), "endpoints": run.get("latency_mean_s")}
    rows = []
    for row in published():
        latency = ours[row.harness]
        ratio = row.score_s / latency if latency else rate / row.samples_per_second if rate and row.samples_per_second else None
        rows.append((row, ratio))
    return rows


def _contact_sheet(folder: Path) -> list[tuple[str, list[str]]]:
    """A few videos spread over the run: prompt, and frames as data addresses."""
    entries = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    there = [entry for entry in entries if (folder / entry["video"]).is_file()]
    chosen = [there[index] for index in sorted(set(np.linspace(0, len(there) - 1, VIDEOS).astype(int)))] if there else []
    sheet = []
    for entry in chosen:
        video = read_mp4(folder / entry["video"])
        frames = video[np.linspace(0, len(video) - 1, FRAMES).round().astype(int)]
        shrink = max(1, video.shape[2] // 320)
        kind = "png" if video.shape[2] <= 160 else "jpeg"
        pictures = [imageio.imwrite("<bytes>", frame[::shrink, ::shrink], extension=f".{kind}") for frame in frames]
        sheet.append((entry["prompt"], [f"data:image/{kind};base64,{base64.b64encode(one).decode()}" for one in pictures]))
    return sheet


def _environment(run: Mapping[str, Any]) -> dict[str, str]:
    """What the run ran on and with, as one flat list."""
    names = ("recipe", "device", "mesh", "world_size", "checkpoint", "noise", "kernels", "experts", "host", "start_s", "commit")
    found: dict[str, Any] = {name: run[name] for name in names if name in run}
    found["start_s"] = charts.seconds(run.get("start_s"))
    listed = {name: "; ".join(map(str, value)) for name, value in found.items() if isinstance(value, list)}
    paired = {name: ", ".join(f"{a}: {b}" for a, b in value.items()) for name, value in found.items() if isinstance(value, dict)}
    flat = {re.sub("_s$", "", name).replace("_", " "): str({**found, **listed, **paired}[name]) for name in found}
    system = {name.replace("_", " "): str(value) for name, value in run.get("system", {}).items()}
    return {**flat, **run.get("versions", {}), **system}


def _rows(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str, float | None]]:
    """The scores of both runs and the change from the first to the second."""
    times = {
        "latency_early_stopping_s": "early-stopping estimate",
        "latency_p90_s": "90th percentile",
        "latency_mean_s": "mean latency",
        "generate_mean_s": "mean time per sample",
        "start_s": "start-up",
    }
    rows = []
    for key, label in times.items():
        a, b = first.get(key), second.get(key)
        if a is not None or b is not None:
            rows.append((label, charts.seconds(a), charts.seconds(b), _change(a, b)))
    a, b = first.get("samples_per_second"), second.get("samples_per_second")
    if a or b:
        rows.append(("samples per second", f"{a:.4f}" if a else NONE, f"{b:.4f}" if b else NONE, _change(a, b)))
    scores = [(run["vbench"] or {}).get("score") for run in (first, second)]
    if any(score is not None for score in scores):
        a, b = scores
        rows.append(("VBench", f"{a:.4f}" if a else NONE, f"{b:.4f}" if b else NONE, _change(a, b)))
    rows.append(("samples", str(first["queries"]), str(second["queries"]), None))
    return rows


def _change(before: float | None, after: float | None) -> float | None:
    return after / before - 1 if before and after else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)})
    return flat


def _differences(first: Mapping[str, str], second: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """What is not the same in both: name, first, second."""
    names = dict.fromkeys([*first, *second])
    return [(name, first.get(name, NONE), second.get(name, NONE)) for name in names if first.get(name) != second.get(name)]
