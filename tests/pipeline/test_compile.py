"""torch.compile: the same videos except for rounding, and a second start finds its compiled code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from sut.prompts import benchmark_prompts
from tests.conftest import run_module
from wan_mlperf import Pipeline, load_recipe

pytestmark = pytest.mark.slow


def latents(model: Path, folder: Path, cache: Path, *, compiled: bool) -> torch.Tensor:
    overrides = [
        f"model.checkpoint={model}",
        "workload.steps=3",
        "model.dtype=float32",
        "attention.early=sdpa",
        "attention.late=sdpa",
        "gemm.high_noise=bf16",
        "gemm.low_noise=bf16",
        f"compile.experts={str(compiled).lower()}",
    ]
    cases = {"one": [overrides, False, benchmark_prompts()[0], 42]}
    done = run_module(
        ["tests.pipeline.make_latents", str(folder), json.dumps(cases)],
        ranks=2,
        timeout=900,
        env={"TORCHINDUCTOR_CACHE_DIR": str(cache)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made: torch.Tensor = torch.load(folder / "one.pt", weights_only=True)["latents"]
    return made


def test_compiled_is_equal_and_cached(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    eager = latents(model, tmp_path, cache, compiled=False)
    first = latents(model, tmp_path, cache, compiled=True)
    built = kernels(cache)
    again = latents(model, tmp_path, cache, compiled=True)
    assert float((first - eager).norm() / eager.norm()) < 1e-4
    assert torch.equal(first, again)
    assert built and kernels(cache) == built  # the second start compiled nothing


def kernels(cache: Path) -> dict[str, int]:
    """The compiled C++ kernels in a cache, with when each was written."""
    return {file.relative_to(cache).as_posix(): file.stat().st_mtime_ns for file in cache.rglob("*.so")}


def test_a_prompt_of_another_length_compiles_nothing(monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path) -> None:
    """With CFG on two ranks, a rank sees one prompt alone per query: the warm-up's length must do for every other."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    overrides = [f"model.checkpoint={model}", "mesh.ranks=1", "compile.experts=true"]
    pipeline = Pipeline.load(load_recipe("tiny", overrides=overrides))
    expert, noise = pipeline.experts["high_noise"], pipeline.noise().to(pipeline.text_encoder.dtype)
    counters.clear()
    graphs = []
    for prompt in ("warm-up", "a red circle", "a blue square that moves to the left", benchmark_prompts()[0]):
        with torch.inference_mode():
            expert(noise, 900.0, expert.text_keys(pipeline.text_encoder.encode([prompt])), "sage_fp8")
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1] * 4  # one for all layers
