"""The main job as a user starts it, small: LoadGen's verdict, the run folder, the responses, the videos."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from sut import accuracy_log, loadgen, response
from sut.system import SystemUnderTest
from tests.conftest import ROOT, SMALL, run_module
from wan_mlperf import Pipeline, load_recipe
from wan_mlperf.replicas import dispatch
from wan_mlperf.replicas.watch import Watch
from wan_mlperf.video import to_mp4

# The design's list, in addition to latency_p90_s and samples_per_second.
FIELDS = (
    *("scenario", "mode", "valid", "queries", "world_size", "mesh", "device", "recipe"),
    *("workload_is_mlperf", "spans", "versions", "commit"),
)
STAGES = {"text_encode", "denoise_high", "denoise_low", "vae_decode", "to_host", "respond"}


def run(
    model: Path, folder: Path, *more: str, ranks: int | None = None, env: Mapping[str, str] | None = None
) -> dict[str, object]:
    words = ["wan_mlperf.run", *SMALL, "--model", str(model), "--outputs", str(folder), *more]
    done = run_module(words, ranks=ranks, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "VALID" in done.stdout
    result: dict[str, object] = json.loads((folder / "latest" / "result.json").read_text())
    return result


@pytest.mark.job
def test_singlestream_as_make_run_starts_it(model: Path, tmp_path: Path) -> None:
    """Without torchrun: the ranks of the recipe's mesh are started, all 64 queries that early stopping needs are made."""
    count = {"PYTHONPATH": str(ROOT / "tests" / "sut" / "hooks"), "WAN_MLPERF_TEST_COUNT": str(tmp_path / "verified.txt")}
    result = run(model, tmp_path, "--scenario", "singlestream", env=count)
    assert [field for field in FIELDS if field not in result] == []
    assert result["valid"] is True
    assert result["world_size"] == 2
    assert result["workload_is_mlperf"] is False
    queries, latency = result["queries"], result["latency_p90_s"]
    assert isinstance(queries, int) and queries >= 64
    assert isinstance(latency, float) and latency > 0
    spans = result["spans"]
    assert isinstance(spans, dict) and set(spans) == STAGES and all(spans[stage] > 0 for stage in STAGES - {"to_host"})
    folder = tmp_path / "latest"
    for name in ("recipe.yaml", "plan.txt", "mlperf_log_summary.txt", "mlperf_log_detail.txt", "mlperf_log_accuracy.json"):
        assert (folder / name).is_file(), name
    processes = (tmp_path / "verified.txt").read_text().split()
    assert len(processes) == len(set(processes)) == 3, "the launcher and both ranks verify the checkpoint, each of them once"
    assert load_recipe(folder / "recipe.yaml").name == "tiny"
    assert "Result is : VALID" in (folder / "mlperf_log_summary.txt").read_text()


@pytest.mark.job
@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_singlestream_under_torchrun(ranks: int, model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path, "--scenario", "singlestream", ranks=ranks)
    assert (result["valid"], result["world_size"]) == (True, ranks)


@pytest.mark.slow
def test_singlestream_on_eight_ranks(model: Path, tmp_path: Path) -> None:
    sizes = ["--set=workload.height=64", "--set=workload.width=64"]
    result = run(model, tmp_path, "--scenario", "singlestream", *sizes, ranks=8)
    assert (result["valid"], result["world_size"]) == (True, 8)


@pytest.mark.job
def test_offline(model: Path, tmp_path: Path) -> None:
    """The recipe that Offline takes by default makes a replica of every rank."""
    result = run(model, tmp_path, "--scenario", "offline")
    assert result["valid"] is True
    assert (result["recipe"], result["mesh"]) == ("tiny-offline", "2 replicas x CFG 1 x Ulysses 1")
    assert isinstance(result["samples_per_second"], float) and result["samples_per_second"] > 0


@pytest.mark.job
def test_accuracy_gives_frames_and_leaves_every_video(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a shape number {number}\n" for number in range(12)))
    run(model, tmp_path, "--mode", "accuracy", "--prompts", str(prompts), "--keep-accuracy-log")
    folder = tmp_path / "latest"
    entries = json.loads((folder / "prompts.json").read_text())
    assert [entry["prompt"] for entry in entries] == prompts.read_text().splitlines()
    whole = (folder / accuracy_log.WHOLE).read_bytes()
    assert accuracy_log.read_seal(folder) == accuracy_log.Seal(sha256=hashlib.sha256(whole).hexdigest(), bytes=len(whole))
    assert (folder / accuracy_log.NAME).read_bytes() == whole[:4096] + b"\n\n...\n\n" + whole[-4096:]
    logged = {entry["qsl_idx"]: entry["data"] for entry in json.loads(whole)}
    assert set(logged) == set(range(12))
    for entry in entries:
        frames = np.frombuffer(bytes.fromhex(logged[entry["index"]]), np.uint8).reshape(5, 32, 32, 3)
        assert to_mp4(frames, 8) == (folder / entry["video"]).read_bytes()  # what is judged is what was answered


def test_the_response_is_the_frames(model: Path, tmp_path: Path) -> None:
    """LoadGen's log of the response, byte for byte, against a video of the same seed that was made separately."""
    overrides = [flag.removeprefix("--set=") for flag in SMALL]
    recipe = load_recipe("tiny", overrides=[*overrides, f"model.checkpoint={model}", "mesh.ranks=1"])
    pipeline = Pipeline.load(recipe)
    dispatcher = dispatch.start(pipeline, Watch(recipe.faults), pack=lambda frames: frames)
    prompts = ["a red circle", "a blue square"]
    settings = loadgen.make_settings("singlestream", "accuracy", recipe.user_conf_path, len(prompts))

    def fail(*what: object) -> NoReturn:
        raise AssertionError(what)

    system = SystemUnderTest(dispatcher, prompts, accuracy=None, on_sample=lambda: None, on_lost=fail, on_failure=fail)
    loadgen.run(settings, folder=tmp_path, samples=len(prompts), issue=system.issue, flush=system.flush)
    logged = {entry["qsl_idx"]: entry["data"] for entry in json.loads((tmp_path / "mlperf_log_accuracy.json").read_text())}
    for index, prompt in enumerate(prompts):
        frames = pipeline.generate(prompt)
        assert frames is not None and frames.shape == (5, 32, 32, 3) and frames.dtype == np.uint8
        assert bytes.fromhex(logged[index]) == frames.tobytes()


def test_an_audit_file_in_the_working_folder_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoadGen would obey an audit.config that happens to be there. We name the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audit.config").write_text("*.*.performance_issue_same = 1\n*.*.mode = 2\n")
    (tmp_path / "user.conf").write_text("*.SingleStream.min_query_count = 70\n*.SingleStream.min_duration = 0\n")
    settings = loadgen.make_settings("singlestream", "performance", tmp_path / "user.conf", 10)
    seen: list[int] = []

    def issue(samples: Sequence[Any]) -> None:
        for sample in samples:
            seen.append(sample.index)
            response.complete(sample.id, np.zeros(6, np.uint8))

    folder = tmp_path / "logs"
    folder.mkdir()
    loadgen.run(settings, folder=folder, samples=10, issue=issue, flush=lambda: None)
    assert len(seen) >= 70
    assert len(set(seen)) > 1
    assert loadgen.read_detail(folder)["result_validity"] == "VALID"
