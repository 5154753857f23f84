"""Scoring without VBench's environment: which videos count, staging, recorded raw results, the verdict."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sut import prompts as sut_prompts
from sut import result as results
from tests import run_folders
from tests.conftest import ROOT
from wan_mlperf.errors import BadInput, Failed
from wan_mlperf.vbench import __main__ as vbench
from wan_mlperf.vbench import checkpoints as vbench_checkpoints
from wan_mlperf.vbench import environment as vbench_environment
from wan_mlperf.vbench import score as vbench_score
from wan_mlperf.vbench import videos as vbench_videos
from wan_mlperf.vbench.environment import Environment
from wan_mlperf.vbench.score import Raw
from wan_mlperf.vbench.videos import Video, Videos
from wan_mlperf.video import write_mp4
from wan_mlperf.workload import DIMENSIONS

# A real result of the vbench package, of four videos of the embedded model. Its checkpoints had random weights, so the
# numbers mean nothing; their form is what is tested.
RECORDED = json.loads((ROOT / "tests/vbench/vbench_raw.json").read_text(encoding="utf-8"))
PROMPTS = (
    "a person swimming in ocean",
    "a person giving a presentation to a room full of colleagues",
    "alley",
    "A beautiful coastal beach in spring, waves lapping on sand, Van Gogh style",
)


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A short real video."""
    file = tmp_path_factory.mktemp("video") / "video.mp4"
    write_mp4(file, [np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3)).astype(np.uint8)], fps=8)
    return file.read_bytes()


@pytest.fixture
def run(tmp_path: Path, mp4: bytes) -> Path:
    """An accuracy run's folder with the recorded run's four videos, each of other bytes, and its raw results."""
    folder = tmp_path / "run"
    (folder / "videos").mkdir(parents=True)
    entries = []
    for index, prompt in enumerate(PROMPTS):
        (folder / "videos" / f"{index}.mp4").write_bytes(mp4 + bytes([0, 0, 0, 8]) + b"free" * (index > 0))
        entries.append({"index": index, "prompt": prompt, "video": f"videos/{index}.mp4"})
    write_prompts(folder, entries)
    (folder / "mlperf_log_accuracy.json").write_text("[]")
    raw = folder / "vbench" / "raw"
    raw.mkdir(parents=True)
    for dimension, result in RECORDED.items():
        hashes = {f"{prompt}-0.mp4": digest(folder / "videos" / f"{index}.mp4") for index, prompt in enumerate(PROMPTS)}
        now = {**result, "sha256": {video["name"]: hashes[video["name"]] for video in result["videos"]}}
        (raw / f"{dimension}.json").write_text(json.dumps(now))
    return folder


def write_prompts(folder: Path, entries: Any) -> None:
    (folder / "prompts.json").write_text(json.dumps(entries))


def read_entries(folder: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((folder / "prompts.json").read_text())
    return entries


def digest(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()


def judge(folder: Path) -> tuple[int, dict[str, Any]]:
    code = vbench.main([str(folder), "--parse-only"])
    summary: dict[str, Any] = json.loads((folder / "vbench" / "summary.json").read_text(encoding="utf-8"))
    return code, summary


def test_the_benchmarks_prompts_and_dimensions() -> None:
    prompts = vbench_videos.dimensions_by_prompt(vbench.full_info())
    assert list(prompts) == sut_prompts.benchmark_prompts()
    assert Counter(name for names in prompts.values() for name in names) == {
        "subject_consistency": 72,
        "motion_smoothness": 72,
        "dynamic_degree": 72,
        "background_consistency": 86,
        "scene": 86,
        "appearance_style": 90,
    }
    assert not [prompt for prompt in prompts if vbench_videos.why_no_file_name(prompt)]


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


def test_staging_is_by_link(run: Path) -> None:
    prompts = vbench_videos.dimensions_by_prompt(vbench.full_info())
    videos = vbench_videos.sort_out(run, vbench_videos.read_run(run), prompts)
    target = run / "vbench" / "staged"
    target.mkdir()
    (target / "left over from before-0.mp4").touch()
    vbench_videos.stage(run, videos, target)
    assert sorted(link.name for link in target.iterdir()) == sorted(f"{prompt}-0.mp4" for prompt in PROMPTS)
    assert (target / "alley-0.mp4").is_symlink()
    assert (target / "alley-0.mp4").resolve() == (run / "videos" / "2.mp4").resolve()


def test_a_staged_folder_that_is_a_link_is_not_emptied(run: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    (run / "vbench" / "staged").symlink_to(precious)
    vbench_videos.stage(run, Videos(), run / "vbench" / "staged")
    assert (precious / "file").exists()


def truncate(run: Path) -> None:
    video = run / "videos" / "1.mp4"
    video.write_bytes(video.read_bytes()[:-600])


def shorten(run: Path) -> None:
    write_mp4(run / "videos" / "1.mp4", [np.zeros((2, 32, 32, 3), np.uint8)], fps=8)


@pytest.mark.parametrize(
    "spoil, where, line",
    [
        (lambda run: (run / "videos" / "1.mp4").unlink(), "missing", "videos/1.mp4: prompt .* has no video"),
        (truncate, "unreadable", "videos/1.mp4: prompt .*: (cannot be decoded|holds)"),
        (lambda run: (run / "videos" / "1.mp4").write_bytes(b""), "unreadable", "videos/1.mp4: .*cannot be decoded"),
        (shorten, "unreadable", "videos/1.mp4: .*holds 2 frames, scoring needs 3"),
    ],
)
def test_a_lost_video_is_listed_and_there_is_no_score(
    run: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], Any], where: str, line: str
) -> None:
    assert judge(run)[1]["score"] is not None
    spoil(run)
    code, summary = judge(run)
    assert code == 1
    assert [bool(re.match(line, one)) for one in summary["videos"][where]] == [True]
    assert summary["score"] is None and not summary["complete"] and not summary["valid"]
    # What was scored with the lost video no longer counts; the dimensions of other videos stay.
    assert set(summary["dimensions"]) == {"background_consistency", "appearance_style", "scene"}
    assert not (run / "accuracy.txt").exists(), "an older score of the whole run must not stay"
    printed = capsys.readouterr().out
    assert f"{where}: videos/1.mp4" in printed and "INCOMPLETE" in printed


def test_a_cut_video_with_its_index_in_front_is_unreadable(tmp_path: Path) -> None:
    """Such a file opens; only decoding all of it shows the damage."""
    import av

    file = tmp_path / "fast.mp4"
    with av.open(str(file), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 64
        for frame in np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3)).astype(np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    assert vbench_videos.unreadable(file) is None
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    assert vbench_videos.unreadable(file)


def test_a_changed_video_makes_its_results_stale(run: Path, mp4: bytes) -> None:
    (run / "videos" / "2.mp4").write_bytes(mp4)
    code, summary = judge(run)
    assert code == 1 and summary["score"] is None
    assert summary["problems"][0] == "2 dimensions are not scored: background_consistency, scene"


def test_extra_videos_and_prompts_are_listed(run: Path, mp4: bytes) -> None:
    (run / "videos" / "99.mp4").write_bytes(mp4)
    (run / "videos" / "4.mp4").write_bytes(mp4)
    write_prompts(run, [*read_entries(run), {"index": 4, "prompt": "a red circle", "video": "videos/4.mp4"}])
    code, summary = judge(run)
    assert code == 1 and summary["score"] is not None
    assert summary["videos"]["unnamed"] == ["videos/99.mp4"]
    assert summary["videos"]["extra"] == ["videos/4.mp4: prompt 'a red circle' is not one of the benchmark's"]
    assert "1 prompts are not the benchmark's" in summary["problems"]


def test_a_prompt_cannot_leave_the_staging_folder(run: Path) -> None:
    evil = ["../../escaped", "/etc/escaped", "a\0b", "x" * 250, "", "..", "new\nline", "back\\slash"]
    entries = read_entries(run)
    for index, prompt in enumerate(evil, start=4):
        entries.append({"index": index, "prompt": prompt, "video": f"videos/{index}.mp4"})
        (run / "videos" / f"{index}.mp4").write_bytes((run / "videos" / "0.mp4").read_bytes())
    write_prompts(run, entries)
    # Even a prompt that VBench asked for would not be used: give it a list that holds them all.
    prompts = {**vbench_videos.dimensions_by_prompt(vbench.full_info()), **dict.fromkeys(evil, DIMENSIONS)}
    videos = vbench_videos.sort_out(run, vbench_videos.read_run(run), prompts)
    before = {path for path in run.parent.rglob("*")}
    vbench_videos.stage(run, videos, run / "vbench" / "staged")
    assert len(videos.refused) == len(evil)
    assert all("\n" not in line and "\0" not in line and "is not used" in line for line in videos.refused)
    made = {path for path in run.parent.rglob("*")} - before
    assert made == {run / "vbench" / "staged"} | {run / "vbench" / "staged" / f"{prompt}-0.mp4" for prompt in PROMPTS}
    code, summary = judge(run)
    assert code == 1 and summary["videos"]["refused"] == videos.refused


@given(st.text(max_size=300))
def test_any_prompt_is_refused_or_stays_inside(prompt: str) -> None:
    if vbench_videos.why_no_file_name(prompt) is None:
        name = Video(index=0, prompt=prompt, video="").name
        assert Path(name).name == name and len(name.encode()) <= 255 and (Path("/staged") / name).parent == Path("/staged")


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        "{}",
        '["alley"]',
        '[{"index": 0, "prompt": "alley"}]',
        '[{"index": "0", "prompt": "alley", "video": "videos/0.mp4"}]',
        '[{"index": true, "prompt": "alley", "video": "videos/0.mp4"}]',
        '[{"index": 0, "prompt": "alley", "video": "../0.mp4"}]',
        '[{"index": 0, "prompt": "alley", "video": "/tmp/0.mp4"}]',
        '[{"index": 0, "prompt": "alley", "video": "videos/0\\u0000.mp4"}]',
        '[{"index": 0, "prompt": "alley", "video": "videos/0.avi"}]',
        '[{"index": 0, "prompt": "alley", "video": "a.mp4"}, {"index": 1, "prompt": "alley", "video": "b.mp4"}]',
        '[{"index": 0, "prompt": "alley", "video": "a.mp4"}, {"index": 0, "prompt": "beach", "video": "b.mp4"}]',
        '[{"index": 0, "prompt": "alley", "video": "a.mp4"}, {"index": 1, "prompt": "beach", "video": "a.mp4"}]',
    ],
)
def test_a_bad_prompts_file_is_refused(run: Path, content: str) -> None:
    (run / "prompts.json").write_text(content)
    with pytest.raises(BadInput, match=r"prompts.json.*allowed"):
        judge(run)


def test_videos_named_as_vbench_names_them_need_no_prompts_file(tmp_path: Path, mp4: bytes) -> None:
    (tmp_path / "alley-0.mp4").write_bytes(mp4)
    (tmp_path / "alley-1.mp4").write_bytes(mp4)
    (tmp_path / "other.mp4").write_bytes(mp4)
    code, summary = judge(tmp_path)
    assert code == 1 and summary["videos"]["scored"] == 1 and summary["videos"]["unnamed"] == ["alley-1.mp4", "other.mp4"]


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
