"""`bench profile` on two ranks: a table, a trace and figures per rank, whose parts make up the query."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.conftest import SMALL, run_module
from wan_mlperf.bench.profile import PARTS


@pytest.mark.job
def test_two_ranks_leave_a_table_and_a_trace_each(model: Path, tmp_path: Path) -> None:
    words = ["wan_mlperf.bench", "profile", *SMALL, "--model", str(model), "--set=mesh.ranks=2", "-o", str(tmp_path)]
    done = run_module(words)
    assert done.returncode == 0, done.stderr[-3000:]
    for part in PARTS:
        assert part.replace("_", " ") in done.stdout
    for rank in (0, 1):
        row = json.loads((tmp_path / f"profile-{rank}.json").read_text())
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"], rel=0.05)
        for part in ("text_encode", "attention", "gemm", "exchange", "elementwise", "vae_decode"):
            assert row["parts"][part] > 0, part
        assert row["parts"]["host"] < 0.6 * row["seconds"]
        with gzip.open(tmp_path / f"trace-{rank}.json.gz", "rt") as stream:
            names = {event.get("name") for event in json.load(stream)["traceEvents"]}
        assert {"stage: denoise_low", "stage: vae_decode", "part: attention", "part: exchange"} <= names
