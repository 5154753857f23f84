"""`bench profile`: a table, a trace and figures per rank, whose parts make up the query."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from tests.conftest import SMALL, run_module
from wan_mlperf.bench.profile import PARTS, by_kernel, part_of_kernel


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


def test_a_gpus_kernels_are_told_apart_by_name() -> None:
    """Every kernel of a whole query on an H100, as recorded there; the sums were made by hand, from the kernels' names."""
    recorded = json.loads((Path(__file__).parent / "h100_kernels.json").read_text())["kernels"]
    found: dict[str, float] = defaultdict(float)
    for stage, name, _calls, seconds in recorded:
        found[part_of_kernel(name, stage.removeprefix("stage: "))] += seconds
    expected = {"attention": 21.14, "gemm": 5.11, "elementwise": 2.81, "vae_decode": 4.92, "text_encode": 0.06}
    for part, seconds in expected.items():
        assert found[part] == pytest.approx(seconds, abs=0.02), part
    assert found["exchange"] == 0 and found["to_host"] < 0.01


def test_parts_of_a_gpu_never_exceed_the_query() -> None:
    """Ranges are not time of their own, and where two streams overlap, time counts once."""

    def event(name: str, start: float, end: float, **how: Any) -> FunctionEvent:
        return FunctionEvent(0, name, 0, start, end, **{"device_type": DeviceType.CUDA, **how})

    events = [
        event("stage: denoise_high", 0, 900_000, is_user_annotation=True),
        event("part: attention", 0, 300_000, is_user_annotation=True),
        event("## Call CompiledFxGraph f2 ##", 0, 900_000, is_user_annotation=True),
        event("part: exchange", 480_000, 700_000, is_user_annotation=True, device_resource_id=20),
        event("a kernel of no known name", 0, 200_000),
        event("part: exchange", 210_000, 250_000, is_user_annotation=True),  # within attention: the innermost counts
        event("a copy", 220_000, 240_000),
        event("nvjet_sm90_tst_192x208", 300_000, 600_000),
        event("ncclDevKernel_SendRecv", 500_000, 700_000, device_resource_id=20),
        event("a norm beside it", 650_000, 700_000),
        event("triton_red_fused__flash_attn_forward__scaled_mm_amax", 700_000, 800_000),
        event("aten::mm", 0, 900_000, device_type=DeviceType.CPU),
    ]
    parts = by_kernel(events, 1.0)
    expected = {"attention": 0.2, "gemm": 0.3, "exchange": 0.12, "elementwise": 0.1, "host": 0.28}
    assert {part: seconds for part, seconds in parts.items() if seconds} == pytest.approx(expected)
