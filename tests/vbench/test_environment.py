"""VBench's environment: bad input before it is used, its pins, its checkpoints, and workers that fail."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.vbench.recorded import RECORDED
from wan_mlperf.errors import BadInput
from wan_mlperf.vbench import __main__ as vbench
from wan_mlperf.vbench import checkpoints as vbench_checkpoints
from wan_mlperf.vbench import environment as vbench_environment
from wan_mlperf.vbench import videos as vbench_videos
from wan_mlperf.vbench.environment import Environment
from wan_mlperf.workload import DIMENSIONS


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no folder was given"),
        (["nowhere"], "'nowhere' is not a folder"),
        (["--dimensions", "motion_smoothness,scen", "."], "did you mean 'scene'"),
        ([".", "--device", "gpu"], "allowed: cpu, cuda"),
        (["--torch", "torch==2.13.0", "."], "only together with --setup"),
        ([str(ROOT)], "VBench's environment is not at .*--setup"),
        ([str(ROOT), "--parse-only"], "no prompts.json"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        vbench.main(arguments)


def test_missing_checkpoints_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))  # read when it was imported
    lines = vbench_checkpoints.missing(DIMENSIONS)
    assert len(lines) == 7
    for line in lines:
        assert re.fullmatch(r"https://\S+( \(.+\))? -> " + re.escape(str(tmp_path)) + r"/\S+", line)
    assert len(vbench_checkpoints.missing(["motion_smoothness"])) == 1
    bert = tmp_path / "hub" / "models--bert-base-uncased" / "snapshots" / "0123"
    bert.mkdir(parents=True)
    for name in ("config.json", "vocab.txt", "model.safetensors"):
        (bert / name).touch()
    refs = bert.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    assert len(vbench_checkpoints.missing(DIMENSIONS)) == 6, "BERT is also found where VBench would have left it"


def test_the_requirements_are_pinned_and_bring_no_torch() -> None:
    pins = vbench_environment.plan([])
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins)
    assert not [pin for pin in pins if pin.startswith("torch==")]
    assert [pin for pin in vbench_environment.plan(["torch==2.13.0"]) if pin.startswith("torchvision==")]
    assert not [pin for pin in vbench_environment.plan(["torch==2.9", "torchvision==0.24"]) if pin.startswith("torchvision")]


def test_the_worker_is_where_the_environment_looks_for_it() -> None:
    assert vbench_environment.WORKER.is_file() and "vbench.VBench(" in vbench_environment.WORKER.read_text()


def worker_that(commands: str, folder: Path) -> Environment:
    """An environment whose interpreter is this shell script."""
    environment = Environment(folder / "environment")
    environment.python.parent.mkdir(parents=True)
    environment.python.write_text(f"#!/bin/sh\n{commands}\n")
    environment.python.chmod(0o755)
    return environment


def test_a_dimension_that_fails_is_said_and_the_others_go_on(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    environment = worker_that('echo "Traceback" >&2; echo "RuntimeError: out of memory" >&2; exit 1', run)
    prompts = vbench_videos.dimensions_by_prompt(vbench.full_info())
    videos = vbench_videos.sort_out(run, vbench_videos.read_run(run), prompts)
    (run / "vbench" / "raw" / "scene.json").unlink()
    (run / "vbench" / "raw" / "motion_smoothness.json").unlink()
    failures = vbench.score(environment, run, videos, prompts, ["scene", "motion_smoothness"], "cpu")
    assert [line.split(" (exit")[0] for line in failures] == [
        "scene: RuntimeError: out of memory",
        "motion_smoothness: RuntimeError: out of memory",
    ]
    assert "RuntimeError: out of memory" in (run / "vbench" / "scene.log").read_text()
    assert "scene: failed" in capfd.readouterr().err


def test_a_killed_dimension_is_named_by_its_signal(run: Path) -> None:
    failure = vbench.run_worker(worker_that("kill -9 $$", run), {"dimension": "scene"}, run / "vbench" / "scene.log")
    assert failure is not None and "SIGKILL" in failure


def test_what_is_scored_already_is_not_scored_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = worker_that("exit 1", run)
    prompts = vbench_videos.dimensions_by_prompt(vbench.full_info())
    videos = vbench_videos.sort_out(run, vbench_videos.read_run(run), prompts)
    monkeypatch.setattr(vbench_checkpoints, "hashes", lambda names: RECORDED[names[0]]["checkpoints"])
    assert vbench.score(environment, run, videos, prompts, DIMENSIONS, "cpu") == []
    monkeypatch.setattr(vbench_checkpoints, "hashes", lambda names: {"another": "checkpoint"})
    assert len(vbench.score(environment, run, videos, prompts, DIMENSIONS, "cpu")) == 6
