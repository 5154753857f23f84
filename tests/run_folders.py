"""Run folders like those of `wan_mlperf.run`, without an engine. LoadGen's logs are real, the other numbers invented."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from sut import accuracy_log, compliance, machine
from sut import result as results
from sut.loadgen import read_detail
from sut.prompts import benchmark_prompts
from sut.run_record import describe_kernels
from tests.engine_stub import make_logs
from wan_mlperf.division import division_of
from wan_mlperf.kernels import attention, gemm
from wan_mlperf.kernels.device import Device
from wan_mlperf.kernels.numerics import exchange_text
from wan_mlperf.kernels.probe import missing, missing_gemm
from wan_mlperf.recipe import load_recipe, to_yaml
from wan_mlperf.step_plan import make_plan
from wan_mlperf.vbench import summary as vbench_summary
from wan_mlperf.vbench.score import FLOOR, LISTS, accuracy_text
from wan_mlperf.vbench.summary import DimensionScore, Summary, VideoLists
from wan_mlperf.video import write_mp4
from wan_mlperf.workload import DIMENSIONS

TINY = load_recipe("tiny")
CPU = Device(arch="cpu", name="a processor", torch=torch.device("cpu"))
KERNELS = describe_kernels(
    attention.resolve(["sage_fp4", "sage_fp8"], CPU, references=TINY.stands_for, probe=missing),
    gemm.resolve(TINY.gemm, CPU, allow_reference=True, probe=missing_gemm),
    TINY.gemm.fp8_scales,
)
KERNELS["numerics"]["exchange"] = exchange_text(TINY.exchange, 1)  # CFG 2 x Ulysses 1
RECIPE = to_yaml(TINY)
RECIPE_VALUES = yaml.safe_load(RECIPE)
PLAN = make_plan(TINY, TINY.effective_workload)


def result(scenario: str, mode: str, **changes: Any) -> dict[str, Any]:
    """The content of a result.json, with everything that a real one has."""
    seconds = [2 + 0.1 * ((7 * index) % 11) for index in range(64)]
    values: dict[str, Any] = {
        "version": results.VERSION,
        "scenario": scenario,
        "mode": mode,
        "valid": True,
        "queries": len(seconds),
        "world_size": 2,
        "mesh": "1 replica x CFG 2 x Ulysses 1",
        "device": "cpu: a processor",
        "checkpoint": "embedded",
        "noise": "drawn from seed 42",
        **KERNELS,
        "recipe": "tiny",
        "workload": {"height": 64, "width": 64, "frames": 17, "fps": 8, "steps": 20, "seed": 42},
        "workload_is_mlperf": False,
        "prompts_are_mlperf": True,
        "spans": {
            "text_encode": 0.05,
            "denoise_high": 0.6,
            "denoise_low": 0.9,
            "vae_decode": 0.4,
            "to_host": 0.001,
            "respond": 1e-4,
        },
        "generate_mean_s": 2.5,
        "start_s": 9.0,
        "experts": ["high_noise: 40 mxfp4 linear layers", "low_noise: 40 mxfp4 linear layers"],
        "host": "host ready",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "commit": "c0ffee",
        "commits": {"torch": "cafe"},
        "container": "none",
        "division": "open",
        "division_reasons": list(division_of(TINY, PLAN).reasons),
        "system": machine.measure(Path("/")),
        "plan": [vars(step) for step in PLAN],
        "sample_seconds": seconds,
    }
    if mode == "performance" and scenario == "singlestream":
        values |= {"latency_mean_s": 2.5, "latency_p90_s": 2.9, "latency_early_stopping_s": 3.0}
        values["latency_percentiles_s"] = {"50": 2.5, "90": 2.9, "95": 3.0, "97": 3.0, "99": 3.0}
    elif mode == "performance":
        values["samples_per_second"] = 0.4
    return {**values, **changes}


def audit_outcome(reference: str | None, verdict: str = "TEST PASS") -> dict[str, Any]:
    """What the result of a TEST04 run keeps of its outcome."""
    scores = {"reference_score": 0.0365, "test_score": 0.0364}
    return {"test": "TEST04", "passed": verdict == "TEST PASS", "verdict": verdict, "reference": reference or "", **scores}


def write_summary(folder: Path, score: float, problems: Sequence[str] = ()) -> None:
    """Write VBench's summary of an accuracy run, with this score and these problems."""
    reached = score >= FLOOR
    nothing: dict[str, Any] = dict.fromkeys(LISTS, ())
    (folder / "vbench").mkdir(exist_ok=True)
    vbench_summary.write(
        folder,
        Summary(
            score=score,
            floor=FLOOR,
            reached=reached,
            complete=True,
            valid=reached and not problems,
            problems=tuple(problems),
            dimensions={
                name: DimensionScore(score=score / 100, of=72, device="cpu", seconds=1.0, videos=()) for name in DIMENSIONS
            },
            videos=VideoLists(scored=248, **nothing),
            versions={"vbench": "0.1.5"},
            checkpoints={},
            hash=accuracy_log.whole_sha256(folder),
        ),
    )


def score(folder: Path, value: float, problems: Sequence[str] = ()) -> None:
    """A stand-in for VBench: what it leaves in an accuracy run's folder, with this score."""
    write_summary(folder, value, problems)
    (folder / "vbench" / "raw").mkdir(exist_ok=True)
    for name in DIMENSIONS:
        (folder / "vbench" / "raw" / f"{name}.json").write_text(json.dumps({"mean": value / 100}))
    text = accuracy_text(vbench_summary.read(folder))
    assert text is not None
    (folder / "accuracy.txt").write_text(text)


def lengthen(folder: Path) -> None:
    """Let LoadGen's detail log say that its test had a minimum of 600 s: no test here can take so long."""
    log = folder / "mlperf_log_detail.txt"
    log.write_text(re.sub(r'("key": "effective_min_duration_ms", "value": )\d+', r"\g<1>600000", log.read_text()))


def write(folder: Path, scenario: str, kind: str, *, logs: Path | None = None, **changes: Any) -> Path:
    """Write one run folder. `logs`: the performance run that a TEST04 run is compared with."""
    mode = "accuracy" if kind == "accuracy" else "performance"
    each = 0.01 if scenario == "singlestream" else 0.003
    seconds = each if kind == "performance" else 1.25 * each if kind == "test04" else 0.0
    make_logs(folder, scenario, mode, seconds=seconds, audit=kind == "test04")
    (folder / "recipe.yaml").write_text(RECIPE)
    values = result(scenario, mode, **changes)
    if kind == "test04":
        assert logs is not None
        # A busy machine may slow the reference at the wrong moment, and this does not test the rule.
        outcome = {"passed": True, "verdict": "TEST PASS"}
        values["compliance"] = dataclasses.asdict(compliance.verify(folder, logs, values["sample_seconds"])) | outcome
        (folder / compliance.VERDICT).write_text("Verifying performance.\nTEST PASS\n")
    if kind == "accuracy":
        videos(folder, benchmark_prompts())
        accuracy_log.seal(folder, keep=False)
    assert read_detail(folder)["effective_scenario"].lower() == scenario
    (folder / "result.json").write_text(json.dumps(values))
    return folder


def videos(folder: Path, prompts: list[str]) -> None:
    """An accuracy run's videos and prompts.json; the videos are one small file many times."""
    (folder / "videos").mkdir(parents=True)
    write_mp4(folder / "videos" / "0.mp4", [np.arange(5 * 32 * 32 * 3, dtype=np.uint8).reshape(5, 32, 32, 3)], 8)
    content = (folder / "videos" / "0.mp4").read_bytes()
    for index in range(len(prompts)):
        (folder / "videos" / f"{index}.mp4").write_bytes(content)
    entries = [{"index": index, "prompt": prompt, "video": f"videos/{index}.mp4"} for index, prompt in enumerate(prompts)]
    (folder / "prompts.json").write_text(json.dumps(entries))


def rewrite(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    values: Mapping[str, Any] = json.loads(file.read_text())
    file.write_text(json.dumps({**values, **changes}))
