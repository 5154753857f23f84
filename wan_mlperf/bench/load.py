"""Time and memory that loading takes, each way in a separate process: a rank of ours as the recipe says, diffusers in bf16.

Without --model the checkpoint gets random weights in fp32, as the published one is stored: only sizes matter.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from wan_mlperf import cli, process
from wan_mlperf.bench import random_checkpoint
from wan_mlperf.bench.fidelity import console
from wan_mlperf.errors import BadInput, choose
from wan_mlperf.files import atomic_write, scratch
from wan_mlperf.identity import commit, versions
from wan_mlperf.kernels.device import probe
from wan_mlperf.pipeline import Pipeline
from wan_mlperf.recipe import load_recipe

WAYS = ("ours", "diffusers")
EXPERTS = ("transformer", "transformer_2")
LAYER = 4 * (8 * 2048**2 + 2 * 2048 * 8192)  # bytes of one layer of `random_experts` in fp32


def main(arguments: Sequence[str]) -> int:
    """`bench load`: print a table, write JSON."""
    parser = cli.Parser(prog="python -m wan_mlperf.bench load", description=__doc__)
    parser.add_argument("--model", type=cli.path, metavar="FOLDER", help="a Diffusers folder (default: random weights)")
    parser.add_argument("--gb", type=float, default=3.0, help="size of both random experts together in fp32, in 10^9 bytes")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"some of {', '.join(WAYS)}")
    parser.add_argument("--cores", default="", metavar="N,...", help="how many cores each may use (default: 1, and all)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key of recipe tiny")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    there = len(os.sched_getaffinity(0))
    counts = options.cores.split(",") if options.cores else sorted({"1", str(there)}, key=int)
    for one in counts:
        if not one.isdigit() or not 1 <= int(one) <= there:
            raise BadInput(f"--cores: {one!r} is not allowed; allowed: 1 to {there}, with commas between them")
    if not 0.1 <= options.gb <= 1000:
        raise BadInput(f"--gb: {options.gb} is not allowed; allowed: 0.1 to 1000")
    ways = [choose("--ways", one, WAYS) for one in options.ways.split(",")]
    recipe = load_recipe("tiny", overrides=options.set)
    with scratch("bench-load") as folder:
        model = Path(options.model) if options.model else random_experts(folder, options.gb)
        results = [measure(way, model, options.set, int(cores)) for cores in counts for way in ways]
    formats = f"{recipe.gemm.high_noise} and {recipe.gemm.low_noise}"
    report = {"formats": formats, "device": probe().name, "versions": versions(), "commit": commit(), "results": results}
    show(report)
    if options.json:
        atomic_write(Path(options.json), json.dumps(report, indent=1))
    return process.DONE


def random_experts(folder: Path, gb: float) -> Path:
    """Write a checkpoint whose two experts together take `gb` x 10^9 bytes in fp32: 16 heads of 128, files of at most 1 GB."""
    layers = max(1, round(gb * 1e9 / 2 / LAYER))
    return random_checkpoint.write(folder, layers=layers, heads=16, head_dim=128, ffn=8192, shard="1GB")


def measure(way: str, model: Path, overrides: Sequence[str], cores: int) -> dict[str, Any]:
    """Load once in a new process that may use `cores` cores. Returns bytes and seconds; see `_load`."""
    before, threads = os.sched_getaffinity(0), os.environ.get("OMP_NUM_THREADS")
    os.sched_setaffinity(0, sorted(before)[:cores])  # a new process inherits both
    os.environ["OMP_NUM_THREADS"] = str(cores)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return {"way": way, "cores": cores, **pool.submit(_load, way, model, overrides).result()}
    finally:
        os.sched_setaffinity(0, before)
        os.environ.pop("OMP_NUM_THREADS")
        os.environ.update({} if threads is None else {"OMP_NUM_THREADS": threads})


def _load(way: str, model: Path, overrides: Sequence[str]) -> dict[str, float]:
    """Seconds to load the experts, wall clock and CPU time; bytes: stored, kept as weights, resident before and at peak."""
    stored = sum(file.stat().st_size for part in EXPERTS for file in (model / part).glob("*.safetensors"))
    before, times = _status("VmRSS"), [(time.perf_counter(), time.process_time())]
    if way == "ours":
        recipe = load_recipe("tiny", overrides=[f"model.checkpoint={model}", "mesh.ranks=1", *overrides])
        pipeline = Pipeline.load(recipe, on_part=lambda: times.append((time.perf_counter(), time.process_time())))
        experts: Sequence[torch.nn.Module] = list(pipeline.experts.values())
        start, end = times[1], times[3]  # the groups come first, then the experts
    else:
        from diffusers import WanTransformer3DModel

        load = WanTransformer3DModel.from_pretrained
        experts = [load(model, subfolder=part, torch_dtype=torch.bfloat16).to(probe().torch) for part in EXPERTS]
        start, end = times[0], (time.perf_counter(), time.process_time())
    kept = sum(one.nbytes for expert in experts for one in [*expert.parameters(), *expert.buffers()])
    took = {"seconds": end[0] - start[0], "cpu_seconds": end[1] - start[1]}
    return {**took, "stored": stored, "kept": kept, "before": before, "peak": _status("VmHWM")}


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def show(report: dict[str, Any]) -> None:
    """Print the figures as a table."""
    stored = report["results"][0]["stored"] / 1e9
    table = Table(title=f"loading two experts, {stored:.2f} GB stored, as {report['formats']}; GB of memory; {report['device']}")
    headings = ("", "cores", "s", "s per GB stored", "core s per GB", "weights kept", "at first", "at most", "beyond weights")
    for heading in headings:
        table.add_column(heading, justify="right")
    for one in report["results"]:
        table.add_row(
            one["way"] if one["way"] == "ours" else f"{one['way']}, bf16",
            str(one["cores"]),
            f"{one['seconds']:.1f}",
            f"{one['seconds'] / stored:.2f}",
            f"{one['cpu_seconds'] / stored:.2f}",
            *(f"{size / 1e9:.2f}" for size in (one["kept"], one["before"], one["peak"], one["peak"] - one["kept"])),
        )
    console().print(table)
