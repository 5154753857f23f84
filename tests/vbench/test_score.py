"""From recorded raw results to the summary and the verdict, without VBench's environment."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sut import result as results
from tests import run_folders
from tests.vbench.recorded import PROMPTS, RECORDED, digest, judge
from wan_mlperf.errors import Failed
from wan_mlperf.vbench import __main__ as vbench
from wan_mlperf.vbench import checkpoints as vbench_checkpoints
from wan_mlperf.vbench import score as vbench_score
from wan_mlperf.vbench import videos as vbench_videos
from wan_mlperf.vbench.score import Raw
from wan_mlperf.vbench.videos import Video, Videos
from wan_mlperf.workload import DIMENSIONS


def test_a_recorded_result(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, summary = judge(run)
    mean = 100 * sum(RECORDED[name]["mean"] for name in DIMENSIONS) / 6
    assert code == 1
    assert summary["score"] == pytest.approx(mean)
    assert summary["complete"] and not summary["valid"] and summary["reached"] is (mean >= 69.7752)
    assert summary["problems"][0] == "the run has 4 of the benchmark's 248 prompts"
    assert len(summary["videos"]["not_in_run"]) == 244
    assert set(summary["checkpoints"]) == {one.path for one in vbench_checkpoints.CHECKPOINTS}
    assert summary["versions"]["vbench"] == "0.1.5"
    swimming, presenting = summary["dimensions"]["subject_consistency"]["videos"]
    assert (swimming["index"], swimming["prompt"], presenting["index"]) == (0, PROMPTS[0], 1)
    lines = (run / "accuracy.txt").read_text().splitlines()
    matches = [match for line in lines if (match := re.match(r".*'vbench_score':\s([\d.]+).*", line))]
    assert len(matches) == 1 and float(matches[0][1]) == pytest.approx(mean)
    assert f"hash={digest(run / 'mlperf_log_accuracy.json')}" in lines
    assert lines[0] == "note: the run has 4 of the benchmark's 248 prompts"
    printed = capsys.readouterr().out
    assert all(name in printed for name in DIMENSIONS) and "INVALID" in printed


def test_a_changed_video_makes_its_results_stale(run: Path, mp4: bytes) -> None:
    (run / "videos" / "2.mp4").write_bytes(mp4)
    code, summary = judge(run)
    assert code == 1 and summary["score"] is None
    assert summary["problems"][0] == "2 dimensions are not scored: background_consistency, scene"


def whole_benchmark(mean: float) -> tuple[Videos, dict[str, tuple[str, ...]], dict[str, Raw]]:
    """All 248 prompts, scored with the same value in every dimension."""
    prompts = vbench_videos.dimensions_by_prompt(vbench.full_info())
    videos = Videos()
    for index, prompt in enumerate(prompts):
        video = Video(index=index, prompt=prompt, video=f"videos/{index}.mp4")
        videos.scored[video.name], videos.sha256[video.name] = video, "0"
    raws = {}
    for name in DIMENSIONS:
        hashes = videos.of(name, prompts)
        raws[name] = Raw(
            dimension=name,
            mean=mean,
            videos=[{"name": one, "video_results": mean} for one in hashes],
            device="cpu",
            seconds=1.0,
            versions={"vbench": "0.1.5"},
            sha256=hashes,
            checkpoints={},
        )
    return videos, prompts, raws


@pytest.mark.parametrize("mean, valid", [(0.697753, True), (0.697751, False)])
def test_the_verdict(tmp_path: Path, mean: float, valid: bool) -> None:
    videos, prompts, raws = whole_benchmark(mean)
    summary = vbench_score.summarise(tmp_path, videos, prompts, raws)
    assert summary.problems == () and summary.valid is summary.reached is valid
    assert vbench_score.verdict(summary).startswith("VALID: 69.7753 >= 69.7752" if valid else "INVALID: 69.7751 < 69.7752")
    text = vbench_score.accuracy_text(summary)
    assert text is not None and "hash=" not in text, "a folder without the accuracy log gets no hash"


def test_a_high_score_that_is_not_the_benchmarks_is_not_valid(tmp_path: Path) -> None:
    videos, prompts, raws = whole_benchmark(0.9)
    (tmp_path / "result.json").write_text(json.dumps(run_folders.result("offline", "accuracy", workload_is_mlperf=False)))
    raws["scene"]["versions"] = {"vbench": "0.1.4"}
    raws["appearance_style"]["checkpoints"] = {"clip_model/ViT-B-32.pt": "another"}
    summary = vbench_score.summarise(tmp_path, videos, prompts, raws, results.read(tmp_path))
    assert summary.reached and not summary.valid
    assert list(summary.problems) == [
        "the dimensions were scored with different versions",
        "clip_model/ViT-B-32.pt is not the publisher's file",
        "the videos are of another workload than the benchmark's",
    ]


@pytest.mark.parametrize(
    "change", [{"videos": RECORDED["subject_consistency"]["videos"][:1]}, {"mean": float("nan")}], ids=["left out", "nan"]
)
def test_a_raw_result_that_is_not_whole_is_an_error(run: Path, change: dict[str, Any]) -> None:
    file = run / "vbench" / "raw" / "subject_consistency.json"
    whole = file.read_text()
    file.write_text(json.dumps({**json.loads(whole), **change}))
    with pytest.raises(Failed, match=r"scored 1 of 2 videos|not a finite number"):
        judge(run)
    file.write_text(whole[:100])
    with pytest.raises(Failed, match=r"cannot be read \(Invalid JSON.*; delete it and score again"):
        judge(run)
    file.write_text(json.dumps({"mean": 1.0}))
    with pytest.raises(Failed, match=r"cannot be read \(dimension: Field required\); delete it and score again"):
        judge(run)
