"""The folder of `generate --prompts` is scored as it is: its manifest says which video is whose."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.brought import command
from tests.vbench.recorded import PROMPTS, RECORDED, digest
from wan_mlperf.generate.video_list import VideoList
from wan_mlperf.vbench import __main__ as vbench
from wan_mlperf.vbench import videos as vbench_videos
from wan_mlperf.video import to_mp4
from wan_mlperf.workload import MLPERF

WORKLOAD = {f"workload.{key}": value for key, value in dataclasses.asdict(MLPERF).items()}


def make(folder: Path, prompts: tuple[str, ...] = PROMPTS, first: int = 0, steps: int = MLPERF.steps) -> Path:
    """Videos as `generate --prompts` keeps them, from `first` on, each another one."""
    folder.mkdir(exist_ok=True)
    made = VideoList(folder, prompts, seed=42, recipe={**WORKLOAD, "workload.steps": steps}, force=bool(first))
    made.lock()
    for number in range(first, len(prompts)):
        frames = np.random.default_rng(number).integers(0, 255, (5, 32, 32, 3)).astype(np.uint8)
        made.add(number, to_mp4(frames, fps=8))
    made.unlock()
    return folder


def recorded(folder: Path) -> Path:
    """VBench's raw results for these videos; the scores are recorded ones of others."""
    raw = folder / "vbench" / "raw"
    raw.mkdir(parents=True)
    hashes = {f"{prompt}-0.mp4": digest(folder / f"{number}.mp4") for number, prompt in enumerate(PROMPTS)}
    for dimension, result in RECORDED.items():
        now = {**result, "sha256": {video["name"]: hashes[video["name"]] for video in result["videos"]}}
        (raw / f"{dimension}.json").write_text(json.dumps(now))
    return folder


def summary(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "vbench" / "summary.json").read_text())
    return values


def test_a_list_is_scored(tmp_path: Path) -> None:
    folder = recorded(make(tmp_path / "videos"))
    ended = command.run(vbench.main, str(folder), "--parse-only")
    assert ended.code == 1 and "the run has 4 of the benchmark's 248 prompts" in ended.out
    found = summary(folder)
    assert found["complete"] and found["videos"]["scored"] == 4 and found["videos"]["unnamed"] == []
    assert found["problems"][0] == "the run has 4 of the benchmark's 248 prompts"
    assert not [line for line in found["problems"] if "workload" in line or "ways" in line]
    assert (folder / "accuracy.txt").is_file()
    (folder / "extra.mp4").write_bytes((folder / "0.mp4").read_bytes())
    (folder / "1.mp4").unlink()
    assert command.run(vbench.main, str(folder), "--parse-only").code == 1
    assert summary(folder)["videos"]["unnamed"] == ["extra.mp4"] and len(summary(folder)["videos"]["missing"]) == 1


def test_what_made_the_videos_is_said(tmp_path: Path) -> None:
    folder = make(tmp_path / "videos", steps=4)
    assert vbench_videos.manifest_problems(folder) == [vbench_videos.OTHER_WORKLOAD]
    make(folder, (*PROMPTS, "a pier"), first=len(PROMPTS))
    assert vbench_videos.manifest_problems(folder)[1] == "the videos were made in 2 different ways (manifest.json)"
    assert [one.video for one in vbench_videos.read_run(folder)] == [f"{number}.mp4" for number in range(5)]


@pytest.mark.parametrize(
    ("prompts", "content", "said"),
    [
        (("alley", "alley"), None, "prompt 'alley' is given twice, at index 0 and 1"),
        (("alley",), '{"videos": {}}', "cannot be used (KeyError: 'recipes'); allowed: one that `generate --prompts` wrote"),
        (("alley",), '{"recipes": {}, "videos": {}}', "names no video; allowed: after `generate --prompts`"),
    ],
)
def test_what_cannot_be_scored_is_refused(tmp_path: Path, prompts: tuple[str, ...], content: str | None, said: str) -> None:
    folder = make(tmp_path / "videos", prompts)
    if content is not None:
        (folder / "manifest.json").write_text(content)
    ended = command.run(vbench.main, str(folder), "--parse-only")
    assert ended.code == 2 and said in ended.err and len(ended.err.splitlines()) == 1
