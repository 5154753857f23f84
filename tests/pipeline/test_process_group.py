"""A program that has started torch.distributed itself loads a pipeline, and keeps its group."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.conftest import ROOT, SMALL
from wan_mlperf import Pipeline, load_recipe

PROMPT = "a red circle moving left"
OVERRIDES = [flag.removeprefix("--set=") for flag in SMALL]


@pytest.fixture
def own_group() -> Iterator[None]:
    """A group of one rank, of the program's own, and none of ours before or after."""
    from wan_mlperf.parallel import xdit_groups

    xdit_groups.stop_groups()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    xdit_groups.stop_groups()
    if dist.is_initialized():
        dist.destroy_process_group()


def load(model: Path) -> Pipeline:
    return Pipeline.load(load_recipe("tiny", overrides=[*OVERRIDES, f"model.checkpoint={model}"]))


def test_the_programs_own_group_is_used_and_stays(own_group: None, model: Path) -> None:
    before = dist.group.WORLD
    for _ in range(2):  # a second pipeline after the first was closed
        pipeline = load(model)
        assert pipeline.generate(PROMPT) is not None
        pipeline.mesh.close()
        assert dist.group.WORLD is before
        dist.all_reduce(torch.ones(1))


def test_a_group_that_went_away_leaves_nothing(own_group: None, model: Path) -> None:
    """The program ends its group, and with it xDiT's, while a pipeline is loaded: the next one starts anew."""
    first = load(model).generate(PROMPT)
    dist.destroy_process_group()
    second = load(model)
    again = second.generate(PROMPT)
    assert first is not None and again is not None and np.array_equal(first, again)
    second.mesh.close()
    assert not dist.is_initialized()  # this one was ours


PROGRAM = """
import sys
import torch.distributed as dist
from wan_mlperf import Pipeline, load_recipe
rank, store, *overrides = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
pipeline = Pipeline.load(load_recipe("tiny", overrides=overrides))
frames = pipeline.generate("a red circle moving left")
pipeline.mesh.close()
seen = [None, None]
dist.all_gather_object(seen, (str(pipeline.mesh.shape), None if frames is None else frames.shape))
assert seen == [("1 replica x CFG 2 x Ulysses 1", (5, 32, 32, 3)), ("1 replica x CFG 2 x Ulysses 1", None)], seen
"""


@pytest.mark.slow
def test_two_ranks_without_torchrun(model: Path, tmp_path: Path) -> None:
    """No variable says who is who: the group does."""
    arguments = [str(tmp_path / "store"), *OVERRIDES, f"model.checkpoint={model}"]
    started = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(rank), *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    ended = [(process.communicate(timeout=300)[1], process.returncode) for process in started]
    assert [code for _, code in ended] == [0, 0], ended
