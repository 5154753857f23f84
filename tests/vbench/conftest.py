"""An accuracy run's folder whose videos were scored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.vbench.recorded import PROMPTS, RECORDED, digest, write_prompts
from wan_mlperf.video import write_mp4


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
