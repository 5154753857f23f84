"""Branches of guidance that take turns: bit for bit what one after the other gives, and each exchange behind a computation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.parallel import turns
from tests.ranks import run_ranks
from wan_mlperf.errors import BadInput
from wan_mlperf.kernels.device import Device
from wan_mlperf.parallel.interleave import chosen
from wan_mlperf.parallel.mesh import Shape
from wan_mlperf.recipe import MeshRecipe

LAYERS = 3


@pytest.mark.job
@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 4))])
def test_turns(ranks: int, tmp_path: Path) -> None:
    """In fp32, eager and in whole graphs; with four ranks, also tokens that do not divide."""
    file = tmp_path / "outcomes.json"
    run_ranks(turns.main, file, ranks=ranks)
    for name, outcome in json.loads(file.read_text()).items():
        assert outcome["equal"] == [True] * (2 if ranks > 1 and name == "sdpa bf16 bf16" else 1), name
        assert outcome["differ"], "the branches have texts of their own"
        check_order(outcome["order"])


def check_order(events: list[str]) -> None:
    """Between each start and its wait lies a piece, and starts and waits are those of 2 branches x 2 exchanges per layer."""
    pieces = {"first", "middle", "turn", "last"}
    for number in range(4 * LAYERS):
        start, wait = events.index(f"start {number}"), events.index(f"wait {number}")
        assert pieces & set(events[start + 1 : wait]) or number == 4 * LAYERS - 1, f"nothing hides exchange {number}"
    begin = ["first", "start 0", "first", "start 1", "wait 0", "middle", "start 2", "wait 1", "middle", "start 3"]
    assert events[: len(begin)] == begin
    assert events[len(begin) : len(begin) + 6] == ["wait 2", "turn", "start 4", "wait 3", "turn", "start 5"]
    assert events[-4:] == [f"wait {4 * LAYERS - 2}", "last", f"wait {4 * LAYERS - 1}", "last"]
    assert len(events) == 2 * (2 * LAYERS + 1) + 2 * 4 * LAYERS


def test_where_they_take_turns() -> None:
    gpu = Device(arch="gfx950", name="a GPU", torch=torch.device("cuda", 0))
    cpu = Device(arch="cpu", name="a CPU", torch=torch.device("cpu"))
    eight = Shape(replicas=1, cfg=1, ulysses=8, ring=1)
    halves, ring = Shape(replicas=1, cfg=2, ulysses=4, ring=1), Shape(replicas=1, cfg=1, ulysses=4, ring=2)
    alone = Shape(replicas=1, cfg=1, ulysses=1, ring=1)
    auto, yes, no = MeshRecipe(), MeshRecipe(interleave=True), MeshRecipe(interleave=False)
    assert [chosen(auto, shape, gpu) for shape in (eight, halves, ring, alone)] == [True, False, False, False]
    assert not chosen(auto, eight, cpu) and not chosen(no, eight, gpu)
    assert chosen(yes, eight, cpu) and chosen(yes, alone, cpu)
    with pytest.raises(BadInput, match=r"mesh.interleave true: impossible with CFG 2: each rank .*; allowed: auto, false, or"):
        chosen(yes, halves, gpu)
    with pytest.raises(BadInput, match="impossible with ring 2"):
        chosen(yes, ring, gpu)
