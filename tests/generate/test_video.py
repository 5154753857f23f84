"""MP4s read back as they were written, are the same twice, and exist only when they are whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import imageio.v3
import numpy as np
import pytest

from tests.conftest import ROOT
from wan_mlperf.video import contact_sheet, read_mp4, to_mp4, write_mp4, write_mp4_in_background


def frames() -> np.ndarray:
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    video = np.stack([np.roll(np.tile(ramp, (64, 1)), 3 * number, axis=1) for number in range(17)])
    return np.repeat(video[..., None], 3, axis=-1)


def test_written_and_read(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", [frames()[:5], frames()[5:]], 8)
    again = imageio.v3.imread(tmp_path / "a.mp4")
    assert again.shape == (17, 64, 64, 3)
    assert np.array_equal(again, read_mp4(tmp_path / "a.mp4"))
    assert abs(again.astype(int) - frames().astype(int)).mean() < 4
    assert imageio.v3.immeta(tmp_path / "a.mp4", plugin="pyav")["fps"] == 8


def test_the_same_frames_are_the_same_file(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", [frames()], 8)
    write_mp4_in_background(tmp_path / "b.mp4", (frames()[start : start + 4] for start in range(0, 17, 4)), 8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes() == to_mp4(frames(), 8)


@pytest.mark.parametrize("write", [write_mp4, write_mp4_in_background])
def test_a_failure_on_the_way_leaves_nothing(write: object, tmp_path: Path) -> None:
    def failing() -> Iterator[np.ndarray]:
        yield frames()[:4]
        raise MemoryError("decoder")

    assert callable(write)
    with pytest.raises(MemoryError):
        write(tmp_path / "a.mp4", failing(), 8)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        write_mp4_in_background(tmp_path / "missing" / "a.mp4", (frames() for _ in range(10)), 8)


def test_contact_sheet() -> None:
    sheet = contact_sheet([frames(), frames()], per_video=3, gap=4)
    assert sheet.shape == (2 * 68, 3 * 68, 3)
    assert np.array_equal(sheet[:64, :64], frames()[0])


ENCODE = """
import hashlib
import numpy as np
from wan_mlperf.video import to_mp4
(y, x), number = np.mgrid[0:48, 0:64], range(9)
frames = np.stack([np.stack([128 + 90 * np.sin((x + 3 * k) / 9), 2 * y + x / 4, 4 * y - x + 9 * k], -1) for k in number])
print(hashlib.sha256(to_mp4(frames.clip(0, 255).astype(np.uint8), 16)).hexdigest())
"""


def test_a_file_depends_on_its_frames_alone() -> None:
    """Not on what memory held before: x264's AVX-512 code reads some that nobody has written."""
    files = set()
    for fill in ("1", "85", "170", "255"):
        env = {**os.environ, "MALLOC_PERTURB_": fill}  # glibc fills new memory with it
        files.add(
            subprocess.run([sys.executable, "-c", ENCODE], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
        )
    assert len(files) == 1
