"""The programs of examples/, and the one in the README, on a small model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from examples import compare_schedules, stream_frames
from tests.conftest import ROOT
from tests.repository.test_docs import blocks
from wan_mlperf import Pipeline, load_recipe


def small(model: Path) -> list[str]:
    sizes = {"height": 32, "width": 32, "frames": 17, "steps": 4}
    return [f"model.checkpoint={model}", *(f"workload.{name}={value}" for name, value in sizes.items())]


def test_frames_arrive_in_parts(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = Pipeline.load(load_recipe("tiny", overrides=small(model)))
    assert stream_frames.main(pipeline, "a blue square growing") == 17
    lines = capsys.readouterr().out.splitlines()
    assert [int(found) for line in lines for found in re.findall(r"(\d+) frames", line)] == [1, 16]


def test_each_schedule_is_compared_with_exact(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which one is closer says nothing here: the weights are random. tests/embedded/test_embedded.py asks the trained model."""
    half, whole = compare_schedules.main(*small(model))
    assert half != whole and 20 < min(half, whole) < max(half, whole) < 99
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["{'sdpa': 4}", "{'sage_fp4': 2, 'sage_fp8': 2}"] and lines[3] == "{'sage_fp4': 4}"


def test_psnr_is_scikit_images() -> None:
    one, other = np.random.default_rng(0).integers(0, 256, (2, 5, 32, 32, 3), dtype=np.uint8)
    assert compare_schedules.psnr(one, other) == pytest.approx(peak_signal_noise_ratio(one, other, data_range=255))


def test_the_readmes_program(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = [text for language, text in blocks(ROOT / "README.md") if language == "python"]
    recipe = load_recipe("tiny", overrides=small(model))
    monkeypatch.setattr("wan_mlperf.recipe.load_recipe", lambda name: recipe if name == "tiny" else None)
    names: dict[str, Any] = {}
    exec(compile(program, "README.md", "exec"), names)
    assert names["frames"].shape == (17, 32, 32, 3) and names["frames"].dtype == np.uint8
    assert capsys.readouterr().out.splitlines() == ["(1, 32, 32, 3)", "(16, 32, 32, 3)"]
