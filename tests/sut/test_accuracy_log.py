"""The accuracy log: room for it, flat memory while it is written, and what stays of it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sut import accuracy_log
from sut.accuracy_log import NAME, SEAL, WHOLE, Backlog, Seal
from tests.conftest import ROOT
from tests.sut.accuracy_run import frames_of
from wan_mlperf import run
from wan_mlperf.errors import BadInput, Failed
from wan_mlperf.video import to_mp4
from wan_mlperf.workload import MLPERF, Workload

SAMPLES = 248


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A real accuracy run of 248 samples, 180 MB of log, and rank 0's memory after each."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "tests.sut.accuracy_run", str(folder), str(SAMPLES), "160"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    return folder, json.loads(ended.stdout)


@pytest.mark.job
def test_the_log_holds_the_frames_and_the_videos_are_made_of_them(done: tuple[Path, list[float]]) -> None:
    folder, _ = done
    whole = (folder / WHOLE).read_bytes()
    assert accuracy_log.read_seal(folder) == Seal(sha256=hashlib.sha256(whole).hexdigest(), bytes=len(whole))
    entries = json.loads(whole)
    assert sorted(entry["qsl_idx"] for entry in entries) == list(range(SAMPLES))
    workload = Workload(height=160, width=160, frames=5, fps=8, steps=1)
    for entry in entries:
        assert bytes.fromhex(entry["data"]) == frames_of(entry["qsl_idx"], workload).tobytes()
    assert len(list((folder / "videos").iterdir())) == SAMPLES
    for index in (0, 123, 247):
        assert (folder / "videos" / f"{index}.mp4").read_bytes() == to_mp4(frames_of(index, workload), 8)
    # The estimate that is checked before a run covers what was written.
    written = len(whole) + sum(file.stat().st_size for file in (folder / "videos").iterdir())
    assert len(whole) < SAMPLES * (2 * accuracy_log.response_bytes(workload) + accuracy_log.ENTRY) < 1.01 * len(whole)
    assert written > len(whole)


def test_memory_stays_flat(done: tuple[Path, list[float]]) -> None:
    _, memory = done
    # 198 videos of 384 kB after the first 50 are 76 MB, and 152 MB as text.
    assert max(memory[50:]) - memory[50] < 25, memory[::20]


def test_a_slow_disk_holds_the_next_response_back(tmp_path: Path) -> None:
    backlog, log = Backlog(tmp_path, stuck_s=20), tmp_path / NAME
    log.write_bytes(b"[")
    backlog.wait()
    backlog.add(500)
    backlog.wait()  # one may wait in LoadGen
    backlog.add(500)
    grown = []

    def write() -> None:
        for _ in range(10):
            time.sleep(0.02)
            grown.append(100)
            with log.open("ab") as stream:
                stream.write(b"0" * 100)

    thread = threading.Thread(target=write)
    thread.start()
    backlog.wait()
    assert sum(grown) >= 999
    thread.join()


def test_a_log_that_does_not_grow_is_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"[")
    backlog = Backlog(tmp_path, stuck_s=0.05)
    backlog.add(100)
    backlog.add(100)
    with pytest.raises(Failed, match=r"has not grown for 0 s: is the disk full\?"):
        backlog.wait()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("size", [0, 100, 8192, 8193, 10_000_000])
def test_seal(tmp_path: Path, size: int, keep: bool) -> None:
    whole = bytes(range(256)) * (size // 256) + bytes(size % 256)
    (tmp_path / NAME).write_bytes(whole)
    sha256 = hashlib.sha256(whole).hexdigest()
    assert accuracy_log.whole_sha256(tmp_path) == sha256
    assert accuracy_log.submitted(tmp_path, tmp_path / "before") == sha256
    assert accuracy_log.seal(tmp_path, keep=keep) == Seal(sha256=sha256, bytes=size)
    cut = whole if size <= 8192 else whole[:4096] + b"\n\n...\n\n" + whole[-4096:]
    assert (tmp_path / NAME).read_bytes() == cut
    assert accuracy_log.whole_sha256(tmp_path) == sha256
    assert accuracy_log.submitted(tmp_path, tmp_path / "after") == sha256
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes() == cut
    assert {file.name for file in tmp_path.iterdir()} == {NAME, SEAL, "before", "after", *([WHOLE] if keep else [])}
    if keep:
        assert (tmp_path / WHOLE).read_bytes() == whole


def test_a_seal_that_cannot_be_read_and_a_folder_without_a_log(tmp_path: Path) -> None:
    assert accuracy_log.whole_sha256(tmp_path) is None
    (tmp_path / SEAL).write_text("{")
    with pytest.raises(Failed, match="make the accuracy run again"):
        accuracy_log.read_seal(tmp_path)


def test_the_room_is_checked_before_the_run(tmp_path: Path) -> None:
    assert accuracy_log.response_bytes(MLPERF) == 223_948_800 == np.empty((81, 720, 1280, 3), np.uint8).nbytes
    with pytest.raises(BadInput, match=r"GB free; allowed: 459.\d GB for an accuracy run, .* each of the 1000 videos"):
        accuracy_log.check_space(tmp_path, MLPERF, 1000)
    words = ["--mode", "accuracy", "--recipe", "h100", "--outputs", str(tmp_path), "--prompts", str(tmp_path / "prompts.txt")]
    (tmp_path / "prompts.txt").write_text("a circle\n" * 100_000)
    with pytest.raises(BadInput, match=r"allowed: 45909\.5 GB"):
        run.main(words)  # no weights, no ranks: this comes first
    with pytest.raises(BadInput, match="--keep-accuracy-log has no effect"):
        run.parse(["--keep-accuracy-log"])
