"""The parts of tables.py at small sizes on whatever device there is: what a GPU's half hour must not be lost to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.rows import Rows
from tests.gpu.tables import PARTS, Sizes
from wan_mlperf.kernels.device import probe
from wan_mlperf.workload import MLPERF

SMALL = Sizes(
    heads=(2,),
    tokens=96,
    head_dim=32,
    rows=(5, 37),
    features=(64, 96),
    lengths=(17, 512),
    workload=dataclasses.replace(MLPERF, height=32, width=32, frames=5),
    layers=2,
    expert={"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 64},
    vae={"base_dim": 8, "num_res_blocks": 1},
    convolution=(8, 2, 8, 8),
    checkpoint={"heads": 8, "head_dim": 32, "ffn": 256},
    recipe=("workload.height=32", "workload.width=32", "workload.frames=5", "workload.steps=2"),
    compiled=False,
)
AT_LEAST = {"probes": 10, "attentions": 1, "linears": 5, "crossings": 4, "decodes": 8, "experts": 4, "whole": 5}


LONG = ("decodes", "experts", "whole")  # the first two call what tests/bench/test_bench.py calls, too


@pytest.mark.parametrize("part", [pytest.param(one, marks=[pytest.mark.slow] * (one in LONG)) for one in PARTS])
def test_part(part: str, tmp_path: Path) -> None:
    extra: tuple[Any, ...] = (tmp_path,) if part == "whole" else ()
    rows = PARTS[part](probe(), SMALL, *extra)
    assert rows.wrong == []
    assert rows.table.row_count >= AT_LEAST[part]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["attentions", "linears", "crossings", "experts"])
def test_part_compiled(part: str) -> None:
    rows = PARTS[part](probe(), dataclasses.replace(SMALL, compiled=True))
    assert rows.wrong == []


def test_a_row_that_fails_does_not_hide_the_others() -> None:
    rows = Rows("a table", "kernel", "ms")
    for kernel in ("broken", "fine"):
        with rows.row(kernel):
            if kernel == "broken":
                raise RuntimeError("no kernel\nimage")
            rows.add(kernel, 1.0)
    assert rows.table.row_count == 2
    assert rows.wrong == ["broken: RuntimeError: no kernel image ()"]
