"""The folder of `generate --prompts`: which videos are whole, which are missing, and which must not be mixed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from wan_mlperf.errors import BadInput
from wan_mlperf.generate.video_list import VideoList
from wan_mlperf.videos.manifest import MANIFEST

PROMPTS = ["a circle", "a square", "a star"]
EARLY: Mapping[str, object] = {"attention.early": "sdpa"}


def videos(folder: Path, prompts: list[str] = PROMPTS, recipe: Mapping[str, object] = EARLY, *, force: bool = False) -> VideoList:
    return VideoList(folder, prompts, seed=42, recipe=dict(recipe), force=force)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two of three videos."""
    made = videos(tmp_path)
    made.lock()
    for number in (0, 2):
        made.add(number, f"video {number}".encode())
    made.unlock()
    return tmp_path


def test_what_is_there_whole_is_not_made_again(folder: Path) -> None:
    assert videos(folder).missing() == [1]
    (folder / "0.mp4").write_bytes(b"damaged")
    (folder / "2.mp4").unlink()
    assert videos(folder).missing() == [0, 1, 2]


def test_a_longer_list_goes_on(folder: Path) -> None:
    assert videos(folder, [*PROMPTS, "a moon"]).missing() == [1, 3]


def test_a_crash_between_manifest_and_video_is_made_good(folder: Path) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    values["videos"]["1.mp4"] = {**values["videos"]["0.mp4"], "prompt": PROMPTS[1]}
    (folder / MANIFEST).write_text(json.dumps(values))
    (folder / ".1.mp4.abc.mp4").write_bytes(b"half a")
    again = videos(folder)
    again.lock()
    assert again.missing() == [1] and not list(folder.glob(".1.mp4*"))


@pytest.mark.parametrize(
    ("prompts", "recipe", "message"),
    [
        (PROMPTS, {"attention.early": "sage_fp4"}, "was made with attention.early 'sdpa', now 'sage_fp4'"),
        (["a moon", *PROMPTS[1:]], EARLY, "was made with prompt 'a circle', now 'a moon'"),
    ],
)
def test_another_recipe_is_not_mixed_in(folder: Path, prompts: list[str], recipe: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        videos(folder, prompts, recipe).missing()
    assert 0 in videos(folder, prompts, recipe, force=True).missing()


def test_a_file_that_is_not_ours_is_not_replaced(folder: Path) -> None:
    (folder / "1.mp4").write_bytes(b"a holiday")
    with pytest.raises(BadInput, match="does not name it"):
        videos(folder).missing()


def test_two_runs_do_not_share_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan_mlperf.generate.video_list.LOCK_S", 0.1)
    held = videos(folder)
    held.lock()
    with pytest.raises(BadInput, match="another run writes there"):
        videos(folder).lock()
    held.unlock()
    videos(folder).lock()
