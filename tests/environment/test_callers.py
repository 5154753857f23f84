"""A program that uses the pipeline may have set torch's defaults, have threads, and have more than one pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import SMALL
from wan_mlperf import Pipeline, load_recipe

PROMPTS = ("a red circle moving left", "a blue square")


def load(model: Path) -> Pipeline:
    overrides = [flag.removeprefix("--set=") for flag in SMALL]
    return Pipeline.load(load_recipe("tiny", overrides=[*overrides, f"model.checkpoint={model}"]))


def video(pipeline: Pipeline, prompt: str) -> np.ndarray:
    frames = pipeline.generate(prompt)
    assert frames is not None
    return frames


@pytest.fixture(scope="module")
def plain(model: Path) -> Pipeline:
    return load(model)


@pytest.fixture(scope="module")
def videos(plain: Pipeline) -> dict[str, np.ndarray]:
    """Each prompt's video, as a program gets it that has set nothing."""
    return {prompt: video(plain, prompt) for prompt in PROMPTS}


@pytest.fixture
def defaults() -> Iterator[None]:
    """torch's defaults afterwards as before."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("dtype", "where"), [pytest.param(torch.float64, None, marks=pytest.mark.slow), (torch.bfloat16, "meta")]
)
def test_the_callers_defaults_change_nothing_and_stay(
    dtype: torch.dtype, where: str | None, model: Path, videos: dict[str, np.ndarray], defaults: None
) -> None:
    torch.set_default_dtype(dtype)
    torch.set_default_device(where)
    pipeline = load(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(video(pipeline, PROMPTS[0]), videos[PROMPTS[0]])
    for chunk in pipeline.stream(PROMPTS[1]):  # between two chunks the caller's settings hold
        assert chunk.dtype == np.uint8 and torch.empty(1).dtype == dtype and torch.empty(1).device.type == (where or "cpu")
    assert torch.get_default_dtype() == dtype and torch.get_default_device().type == (where or "cpu")


@pytest.mark.slow
def test_two_pipelines_in_threads(model: Path, plain: Pipeline, videos: dict[str, np.ndarray]) -> None:
    second = load(model)
    jobs = [(pipeline, prompt) for prompt in PROMPTS for pipeline in (plain, second)]
    with ThreadPoolExecutor(len(jobs)) as threads:
        made = list(threads.map(lambda job: video(*job), jobs))
    for (_, prompt), frames in zip(jobs, made, strict=True):
        assert np.array_equal(frames, videos[prompt])


def test_a_video_that_is_given_up_in_one_thread_holds_up_no_other(plain: Pipeline, videos: dict[str, np.ndarray]) -> None:
    left = plain.stream(PROMPTS[1])
    next(left)  # and no further: whoever asked has left
    with ThreadPoolExecutor(1) as other:
        frames = other.submit(video, plain, PROMPTS[0]).result(timeout=120)
    assert np.array_equal(frames, videos[PROMPTS[0]])
