"""The real vbench package scores a run of the embedded model over all six dimensions, in its own environment, on the CPU.

Its checkpoints have the right architectures and random weights, made here: THE SCORES MEAN NOTHING. What is proved is that
the environment builds, that every dimension loads, runs and is read back, and that broken runs are handled. It takes 3 GB of
disk and 4 GB of memory. WAN_MLPERF_TEST_CACHE keeps the environment from one test run to the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, run_module
from wan_mlperf.workload import DIMENSIONS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]  # a busy machine takes several times longer

PROMPTS = {
    "a person swimming in ocean": {"subject_consistency", "motion_smoothness", "dynamic_degree"},
    "alley": {"background_consistency", "scene"},
    "A beautiful coastal beach in spring, waves lapping on sand, Van Gogh style": {"appearance_style"},
}


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment, built by --setup, and random checkpoints; the latter are deleted at the end."""
    cache = Path(os.environ.get("WAN_MLPERF_TEST_CACHE") or tmp_path_factory.mktemp("cache"))
    checkpoints = tmp_path_factory.mktemp("checkpoints")
    variables = {"WAN_MLPERF_CACHE": str(cache), "VBENCH_CACHE_DIR": str(checkpoints), "HF_HUB_CACHE": str(checkpoints / "hub")}
    if not (cache / "vbench" / "ready.json").exists():
        done = run_module(["wan_mlperf.vbench", "--setup"], timeout=1500, env=variables)
        assert done.returncode == 0, done.stderr
        assert str(cache / "vbench") in done.stdout and "vbench==0.1.5" in done.stdout and "ready:" in done.stdout
    script, worker = ROOT / "tests/vbench/make_random_checkpoints.py", ROOT / "wan_mlperf/vbench/worker.py"
    python = cache / "vbench" / "bin" / "python"
    subprocess.run([str(python), "-I", str(script), str(checkpoints), str(worker)], check=True, timeout=1500, capture_output=True)
    yield variables
    shutil.rmtree(checkpoints)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, variables: dict[str, str]) -> Path:
    """An accuracy run of the embedded model, scored."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    # RAFT's correlation pyramid needs 128 pixels.
    size = [f"--set=workload.{key}" for key in ("steps=2", "height=128", "width=128", "frames=5")]
    arguments = ["--scenario=offline", "--mode=accuracy", "--recipe=tiny", f"--prompts={folder / 'prompts.txt'}", *size]
    done = run_module(["wan_mlperf.run", *arguments, f"--outputs={folder}"], timeout=900)
    assert done.returncode == 0, done.stderr
    run = (folder / "latest").resolve()
    code, output = score(run, variables)
    assert code == 1, output
    assert "INVALID" in output and "3 of the benchmark's 248 prompts" in output and "another workload" in output
    return run


def score(run: Path, variables: dict[str, str], *more: str) -> tuple[int, str]:
    done = run_module(["wan_mlperf.vbench", str(run), *more], timeout=2400, env=variables)
    return done.returncode, done.stdout + done.stderr


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "vbench" / "summary.json").read_text(encoding="utf-8"))
    return summary


@pytest.fixture
def copy(scored: Path, tmp_path: Path) -> Path:
    """The scored run, to be spoilt."""
    return Path(shutil.copytree(scored, tmp_path / "run", symlinks=True))


def test_six_dimensions_come_out(scored: Path) -> None:
    summary = summary_of(scored)
    assert set(summary["dimensions"]) == set(DIMENSIONS)
    for name, one in summary["dimensions"].items():
        assert {video["prompt"] for video in one["videos"]} == {prompt for prompt, names in PROMPTS.items() if name in names}
        assert -1 <= one["score"] <= 1
    # The random captioner was given one wish, to say "alley": so captions are made, read and compared with the prompt.
    assert summary["dimensions"]["scene"]["score"] == 1.0
    mean = 100 * sum(summary["dimensions"][name]["score"] for name in DIMENSIONS) / 6
    assert summary["score"] == pytest.approx(mean)
    assert summary["versions"]["vbench"] == "0.1.5"
    assert len(summary["checkpoints"]) == 7 and all(re.fullmatch("[0-9a-f]{64}", one) for one in summary["checkpoints"].values())
    assert "clip_model/ViT-B-32.pt is not the publisher's file" in summary["problems"]
    text = (scored / "accuracy.txt").read_text()
    match = re.search(r".*'vbench_score':\s([\d.]+).*", text)
    assert match is not None and float(match[1]) == pytest.approx(mean)
    log = (scored / "mlperf_log_accuracy.json").read_bytes()
    assert f"\nhash={hashlib.sha256(log).hexdigest()}\n" in text


def test_a_second_call_scores_nothing_again(copy: Path, variables: dict[str, str]) -> None:
    code, output = score(copy, variables)
    assert code == 1 and output.count("scored before") == 6
    assert (copy / "accuracy.txt").exists()


def test_a_removed_video(copy: Path, variables: dict[str, str]) -> None:
    (copy / "videos" / "0.mp4").unlink()
    code, output = score(copy, variables)
    assert code == 1 and "missing: videos/0.mp4" in output and "INCOMPLETE" in output
    assert summary_of(copy)["score"] is None and not (copy / "accuracy.txt").exists()


def test_a_truncated_video(copy: Path, variables: dict[str, str]) -> None:
    video = copy / "videos" / "0.mp4"
    video.write_bytes(video.read_bytes()[:-800])
    code, output = score(copy, variables)
    assert code == 1 and "unreadable: videos/0.mp4" in output and "INCOMPLETE" in output
    assert summary_of(copy)["score"] is None and not (copy / "accuracy.txt").exists()


def test_a_prompt_that_wants_out(copy: Path, variables: dict[str, str]) -> None:
    entries = json.loads((copy / "prompts.json").read_text())
    shutil.copy(copy / "videos" / "0.mp4", copy / "videos" / "3.mp4")
    entries.append({"index": 3, "prompt": "../../escaped", "video": "videos/3.mp4"})
    (copy / "prompts.json").write_text(json.dumps(entries))
    code, output = score(copy, variables)
    assert code == 1 and "refused: videos/3.mp4: prompt '../../escaped' is not used, it holds a path separator" in output
    assert not list(copy.parent.rglob("escaped*"))
    assert sorted(path.name for path in (copy / "vbench" / "staged").iterdir()) == sorted(f"{prompt}-0.mp4" for prompt in PROMPTS)


def test_a_checkpoint_that_cannot_be_loaded(copy: Path, variables: dict[str, str], tmp_path: Path) -> None:
    spoilt = tmp_path / "checkpoints"
    (spoilt / "amt_model").mkdir(parents=True)
    (spoilt / "amt_model" / "amt-s.pth").write_bytes(b"not a checkpoint")
    code, output = score(copy, {**variables, "VBENCH_CACHE_DIR": str(spoilt)}, "--dimensions", "motion_smoothness")
    assert code == 3 and "motion_smoothness: failed" in output and "motion_smoothness.log" in output


def test_a_missing_checkpoint(copy: Path, variables: dict[str, str], tmp_path: Path) -> None:
    code, output = score(copy, {**variables, "VBENCH_CACHE_DIR": str(tmp_path)})
    assert code == 2 and output.count("missing checkpoint: https://") == 7 and str(tmp_path / "amt_model" / "amt-s.pth") in output
