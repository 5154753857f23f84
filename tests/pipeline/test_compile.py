"""torch.compile: the same videos except for rounding, and a second start finds its compiled code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sut.prompts import benchmark_prompts
from tests.conftest import SMALL, run_module
from wan_mlperf import Pipeline, load_recipe


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


@pytest.mark.parametrize("cross", ["sdpa", "native"])
def test_a_block_is_one_graph(cross: str, model: Path) -> None:
    """Nothing in it, such as an import, splits it: what lies on both sides of a split is not compiled together."""
    small = ["workload.height=32", "workload.width=32", "workload.frames=5", "workload.steps=2", "mesh.ranks=1"]
    plain = ["attention.early=sdpa", "attention.late=sdpa", f"attention.cross={cross}", "mesh.interleave=false"]
    pipeline = Pipeline.load(load_recipe("tiny", overrides=[f"model.checkpoint={model}", *small, *plain]))
    for expert in pipeline.experts.values():
        expert.compile(backend="aot_eager", fullgraph=True)  # raises where a graph would end
    torch._dynamo.reset()
    pipeline.generate("a red circle")


@pytest.mark.slow
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


def graphs(model: Path, cache: Path, *overrides: str, ranks: int) -> list[int]:
    """How many are compiled after the warm-up, and after each of several prompts."""
    small = [flag.removeprefix("--set=") for flag in SMALL]
    done = run_module(
        ["tests.pipeline.count_graphs", f"model.checkpoint={model}", "compile.experts=true", *small, *overrides],
        ranks=ranks,
        timeout=1800,
        env={"TORCHINDUCTOR_CACHE_DIR": str(cache)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(one for one in done.stdout.splitlines() if one.startswith("graphs "))
    counted: list[int] = json.loads(line.removeprefix("graphs "))
    return counted


@pytest.mark.slow
@pytest.mark.parametrize("cross", ["sdpa", "native"])
def test_as_many_graphs_on_two_ranks_as_on_one_and_none_after_the_warm_up(cross: str, model: Path, tmp_path: Path) -> None:
    """Whatever the prompts' lengths. With CFG on two ranks, each sees one text per query and not a pair: perhaps fewer graphs."""
    kernel = f"attention.cross={cross}"
    (one, *later) = graphs(model, tmp_path, kernel, "mesh.ranks=1", ranks=1)
    assert one > 0 and later == [one] * 3
    assert graphs(model, tmp_path, kernel, "mesh.cfg=1", "mesh.ulysses=2", ranks=2) == [one] * 4
    (split, *later) = graphs(model, tmp_path, kernel, "mesh.cfg=2", ranks=2)
    assert 0 < split <= one and later == [split] * 3
