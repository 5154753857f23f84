"""Which videos count for VBench, and how they are staged for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sut import prompts as sut_prompts
from tests.vbench.recorded import PROMPTS, judge, read_entries, write_prompts
from wan_mlperf.errors import BadInput
from wan_mlperf.vbench import __main__ as vbench
from wan_mlperf.vbench import videos as vbench_videos
from wan_mlperf.vbench.videos import Video, Videos
from wan_mlperf.video import write_mp4
from wan_mlperf.workload import DIMENSIONS


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
