"""Within a query things are computed once, nothing of a query outlives it, and frames come as they are decoded."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from wan_mlperf import Pipeline, load_recipe
from wan_mlperf.pipeline import Query
from wan_mlperf.recipe import replace_workload
from wan_mlperf.step_plan import Step

SIZES = ["workload.height=32", "workload.width=32", "workload.frames=17", "workload.steps=3", "mesh.ranks=1"]


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Pipeline:
    return load(model)


def load(model: Path, *more: str) -> Pipeline:
    return Pipeline.load(load_recipe("tiny", overrides=[*SIZES, f"model.checkpoint={model}", *more]))


def made(pipeline: Pipeline, prompt: str, **keys: Any) -> np.ndarray:
    frames = pipeline.generate(prompt, **keys)
    assert frames is not None
    return frames


def test_a_query_leaves_nothing_behind(pipeline: Pipeline, model: Path) -> None:
    """The second of two queries equals the only one of a new pipeline, and a repeated one equals itself."""
    first = made(pipeline, "a red circle moving left on a blue background")
    second = made(pipeline, "a cat walking on a wooden fence")
    assert np.array_equal(second, made(load(model), "a cat walking on a wooden fence"))
    assert np.array_equal(first, made(pipeline, "a red circle moving left on a blue background"))
    assert not np.array_equal(first, second)


def test_a_negative_prompt_and_a_seed_count(pipeline: Pipeline) -> None:
    plain = made(pipeline, "a red circle")
    assert not np.array_equal(plain, made(pipeline, "a red circle", seed=1))
    assert not np.array_equal(plain, made(pipeline, "a red circle", negative_prompt="a blue square"))
    assert np.array_equal(plain, made(pipeline, "a red circle", seed=42))


def test_repeating_a_sample_does_all_of_the_work_again(pipeline: Pipeline) -> None:
    """What TEST04 looks for: were anything cached by prompt, the same prompt again would call fewer of torch's operations."""

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls[str(func)] += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for prompt in ("a red circle", "a red circle", "a blue square"):  # of as many tokens
        calls: Counter[str] = Counter()
        with Count():
            made(pipeline, prompt)
        counts.append(calls)
    assert sum(counts[1].values()) > 1000
    assert counts[1] == counts[2]


def test_the_stream_is_the_video(pipeline: Pipeline) -> None:
    chunks = list(pipeline.stream("a red circle"))
    assert [len(chunk) for chunk in chunks] == [1, 16]
    assert np.array_equal(np.concatenate(chunks), made(pipeline, "a red circle"))
    assert all(chunk.dtype == np.uint8 and chunk.flags.c_contiguous for chunk in chunks)


def test_the_first_frames_come_early(pipeline: Pipeline) -> None:
    latents = pipeline.latents(["a red circle"]).repeat(1, 1, 1, 2, 2)  # 64 x 64, as the embedded model has it

    def share() -> float:
        start = time.process_time()  # not the time that other processes take
        times = [time.process_time() - start for _ in pipeline.decoder.decode(latents)]
        return times[0] / times[-1]

    share()  # A process's first decode also makes oneDNN's convolutions, nearly all of them for the first frames.
    assert statistics.median(share() for _ in range(7)) < 1 / 3


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_the_chunk_changes_nothing_that_shows(chunk: int, pipeline: Pipeline, model: Path) -> None:
    whole = made(pipeline, "a red circle").astype(int)
    other = made(load(model, f"vae.chunk={chunk}"), "a red circle").astype(int)
    assert abs(whole - other).max() <= 1
    assert (whole != other).mean() <= 1e-3


def test_a_batch_is_its_single_videos(pipeline: Pipeline) -> None:
    prompts = ["a red circle moving left", "a cat"]
    together = np.concatenate(list(pipeline.stream_batch(prompts)), axis=1)
    for video, prompt in zip(together, prompts, strict=True):
        difference = abs(video.astype(int) - made(pipeline, prompt).astype(int))
        # Matrix products of another size round in another order; four bits of an activation may then fall the other way.
        assert difference.mean() < 1.0


def test_a_fixed_latent_is_used(model: Path, tmp_path: Path, pipeline: Pipeline) -> None:
    import torch

    file = tmp_path / "fixed_latent.pt"
    torch.save(pipeline.noise(seed=7), file)
    fixed = load(model, f"model.fixed_latent={file}")
    assert torch.equal(fixed.noise(), pipeline.noise(seed=7))
    assert np.array_equal(made(fixed, "a red circle"), made(pipeline, "a red circle", seed=7))


def test_each_query_of_a_batch_has_its_own_seed_and_negative_prompt(pipeline: Pipeline) -> None:
    ways: list[dict[str, Any]] = [{}, {"seed": 1}, {"negative_prompt": "a blue square"}]
    together = np.concatenate(list(pipeline.stream_batch([Query("a red circle", **way) for way in ways])), axis=1)
    for video, way in zip(together, ways, strict=True):
        single = made(pipeline, "a red circle", **way).astype(int)
        apart = [abs(other.astype(int) - single).mean() for other in together]
        assert min(apart) == abs(video.astype(int) - single).mean() < 1.0 and sorted(apart)[1] > 2.0


def test_another_workload_is_that_of_a_pipeline_loaded_for_it(pipeline: Pipeline, model: Path) -> None:
    changes = {"height": 48, "width": 64, "frames": 9, "steps": 2, "guidance_high": 5.0}
    fresh = load(model, *(f"workload.{key}={value}" for key, value in changes.items()))
    changed = pipeline.with_workload(replace_workload(pipeline.workload, **changes))
    assert np.array_equal(made(changed, "a red circle"), made(fresh, "a red circle"))
    assert made(pipeline, "a red circle").shape == (17, 32, 32, 3)


def test_a_query_that_is_given_up_leaves_nothing_behind(pipeline: Pipeline) -> None:
    plain = made(pipeline, "a red circle")

    def give_up(step: Step, _latents: Any) -> None:
        if step.index == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        list(pipeline.stream_batch(["a cat"], on_step=give_up))
    assert np.array_equal(plain, made(pipeline, "a red circle"))
