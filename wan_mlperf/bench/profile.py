"""Where the time of one query goes, on every rank: `python -m wan_mlperf.bench profile --recipe R`.

One warmed-up query runs under torch.profiler. Each rank leaves a trace that Perfetto opens (ui.perfetto.dev); the first prints a
table by part. On a CPU the time is that of the operations themselves; on a GPU that of its kernels and copies, which are told
apart by their names, because compiled code has no operations. Time that nothing covers is "host": Python, launches, gaps.
Profiling slows a query down, so look at the shares.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from rich.table import Table
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function

from wan_mlperf import cli, preflight, process, ranks
from wan_mlperf.bench.fidelity import console, start_ranks
from wan_mlperf.files import atomic_write, writable_folder
from wan_mlperf.parallel.batched import Batched
from wan_mlperf.parallel.interleave import Interleaved
from wan_mlperf.pipeline import Pipeline
from wan_mlperf.predict import hardware, work
from wan_mlperf.spans import Spans
from wan_mlperf.step_plan import Step

P = ParamSpec("P")
R = TypeVar("R")

PARTS = ("text_encode", "attention", "gemm", "exchange", "elementwise", "vae_decode", "to_host", "host")
PROMPT = "a red circle moving left on a blue background"
STAGE = "stage: "  # prefix of a stage's range in the trace; PART is that of a part's
PART = "part: "
# What a CPU's operation is, by its name.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise")
KERNELS = ("scaled_dot_product", "attn", "sage_", "attention_forward")  # compiled code has none of our names
MESSAGES = ("c10d::", "_c10d_functional::", "gloo:")
# What a GPU's kernel computes, by words in its name: attention of cuDNN, FlashAttention, SageAttention, AITER, PyTorch; products
# of cuBLAS (nvjet), hipBLASLt (Cijk) and AITER. The compiler names its own after all that it fuses, which is elementwise.
COMPILED, TEMPLATE = "triton_", "triton_tem"  # a template is a product
KERNEL_WORDS = (
    ("exchange", ("nccl", "rccl", "msccl")),
    ("attention", ("flash", "fmha", "attn", "attention", "sdpa_sm", "mha_", "sage_fwd")),
    ("gemm", ("nvjet", "gemm", "cijk_", "cutlass", "splitk", TEMPLATE)),
)


class _LabelledSpans(Spans):
    """Spans that also name the stage in the trace."""

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        with record_function(f"{STAGE}{stage}"), super().__call__(stage):
            yield


def main(arguments: Sequence[str]) -> int:
    """`bench profile`: a table, and a trace per rank."""
    options = parse(arguments)
    recipe = preflight.recipe_from(options)
    setup = preflight.prepare(recipe, prompts=[PROMPT], world=preflight.ranks_for(recipe))
    folder = writable_folder(Path(options.output), what="output folder")
    if (code := start_ranks(recipe, "profile", arguments)) is not None:
        return code
    pipeline = Pipeline.load(setup)
    _label_calls(pipeline)  # before the warm-up, which compiles what is to be compiled
    pipeline.warm_up(max(1, recipe.warmup_queries))
    parts, seconds = profile(pipeline, folder / f"trace-{ranks.rank()}.json.gz")
    row = {"rank": ranks.rank(), "seconds": seconds, "parts": parts, "peak": shares_of_peak(pipeline, parts)}
    atomic_write(folder / f"profile-{ranks.rank()}.json", json.dumps(row, indent=1))
    pipeline.mesh.barrier()  # every rank's file is there
    if pipeline.mesh.rank == 0:
        rows = [json.loads((folder / f"profile-{rank}.json").read_text()) for rank in range(pipeline.mesh.shape.world)]
        show(rows, f"{recipe.name}, {pipeline.mesh.shape}, {pipeline.mesh.device.name}")
        print(f"traces, one per rank: {folder}/trace-*.json.gz")
    pipeline.mesh.close()
    return process.DONE


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="python -m wan_mlperf.bench profile", description=__doc__)
    cli.add_recipe_arguments(parser)
    parser.add_argument(
        "-o", "--output", type=cli.path, default="outputs/profile", metavar="FOLDER", help="where traces and figures go"
    )
    return parser.parse_args(arguments)


def profile(pipeline: Pipeline, trace: Path) -> tuple[dict[str, float], float]:
    """Run one query and write its trace; return seconds by part, and the query's own."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if pipeline.mesh.device.is_gpu else [])]
    pipeline.spans = _LabelledSpans(pipeline.mesh.device.torch)
    pipeline.mesh.barrier()
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in pipeline.stream(PROMPT):
            pass
        if pipeline.mesh.device.is_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    profiler.export_chrome_trace(str(trace))
    events = profiler.events() or []
    return (by_kernel if pipeline.mesh.device.is_gpu else by_part)(events, seconds), seconds


def by_part(events: Iterable[FunctionEvent], seconds: float) -> dict[str, float]:
    """Sum a CPU's self time by part, in seconds. The range of a part has self time, too; that of a stage is host."""
    found: dict[str, float] = defaultdict(float)
    for event in events:
        own = event.self_cpu_time_total / 1e6
        if event.is_async or _root(event).name.startswith("autograd"):
            continue
        part = part_of(event)
        if part is not None and own > 0:
            found[part] += own
    found["host"] = max(0.0, seconds - sum(value for part, value in found.items() if part != "host"))
    return {part: found[part] for part in PARTS}


def by_kernel(events: Iterable[FunctionEvent], seconds: float) -> dict[str, float]:
    """Sum the time in which a GPU computes or copies by part, in seconds.

    Where kernels of two streams overlap, the one that began first counts, so that the parts never exceed the query.
    """
    kernels: list[FunctionEvent] = []
    ranges: list[FunctionEvent] = []
    for one in events:
        if one.device_type != DeviceType.CPU:
            is_range = one.is_user_annotation or one.name.startswith((STAGE, PART, "## Call"))
            (ranges if is_range else kernels).append(one)
    kernels.sort(key=lambda one: one.time_range.start)
    coming = deque(sorted((one for one in ranges if one.name.startswith((STAGE, PART))), key=lambda one: one.time_range.start))
    found: dict[str, float] = defaultdict(float)
    around: list[FunctionEvent] = []
    free = 0.0  # until when the GPU is busy with what has been counted
    for one in kernels:
        start, end = one.time_range.start, one.time_range.end
        while coming and coming[0].time_range.start <= start:
            around.append(coming.popleft())
        around = [other for other in around if other.time_range.end > start]
        stage = next((other.name.removeprefix(STAGE) for other in reversed(around) if other.name.startswith(STAGE)), "")
        # A range of the GPU is that of one stream: what runs beside an exchange is not part of it.
        stream = [other.name for other in around if other.device_resource_id == one.device_resource_id]
        label = next((name.removeprefix(PART) for name in reversed(stream) if name.startswith(PART)), "")
        found[part_of_kernel(one.name, stage, label)] += max(0.0, end - max(start, free)) / 1e6
        free = max(free, end)
    found["host"] = max(0.0, seconds - sum(found.values()))
    return {part: found[part] for part in PARTS}


def part_of_kernel(name: str, stage: str, label: str = "") -> str:
    """Which part a kernel or copy of a GPU belongs to; `label` is the innermost part that it was launched in, if any."""
    if "DtoH" in name or "Device -> Host" in name:
        return "to_host"
    words = "" if name.startswith(COMPILED) and not name.startswith(TEMPLATE) else name.lower()
    by_name = next((part for part, some in KERNEL_WORDS if any(word in words for word in some)), None)
    if stage and not stage.startswith("denoise"):
        return "exchange" if by_name == "exchange" else stage
    return by_name or label or "elementwise"


def part_of(event: FunctionEvent) -> str | None:
    """Which part the self time of a CPU's event belongs to; None outside every stage, for instance on a library's thread."""
    name, stage = event.name, None
    part = "exchange" if name.startswith(MESSAGES) else "attention" if any(word in name for word in KERNELS) else None
    above: FunctionEvent | None = event
    while above is not None and stage is None:
        if above.name.startswith(PART):
            part = part or above.name.removeprefix(PART)
        if above.name.startswith(STAGE):
            stage = above.name.removeprefix(STAGE)
        above = above.cpu_parent
    if part is not None:
        return part
    if stage is None or name.startswith(STAGE):
        return "host" if stage is not None else None
    if not stage.startswith("denoise"):
        return stage
    inside = [name]
    above = event.cpu_parent
    while above is not None:
        inside.append(above.name)
        above = above.cpu_parent
    return "gemm" if any(one.startswith(PRODUCTS) for one in inside) else "elementwise"


def _root(event: FunctionEvent) -> FunctionEvent:
    while event.cpu_parent is not None:
        event = event.cpu_parent
    return event


def _label_calls(pipeline: Pipeline) -> None:
    """Name attention and the exchange between ranks in the trace, for as long as this process lives."""

    def label(holder: object, attribute: str, part: str) -> None:
        setattr(holder, attribute, _labelled(getattr(holder, attribute), part))

    for expert in pipeline.experts.values():
        label(expert, "self_attend", "attention")
        label(expert, "cross_attend", "attention")
    together = pipeline.experts["high_noise"].together  # both experts' own
    if isinstance(together, Batched):
        label(together, "self_attend", "attention")
    elif isinstance(together, Interleaved):
        label(together, "attend", "attention")
        begin = _labelled(together.start, "exchange")
        together.start = lambda packed: _labelled(begin(packed), "exchange")  # type: ignore[method-assign]
    label(pipeline.mesh, "all_branches", "exchange")
    label(pipeline.mesh, "gather_to_first", "exchange")
    if pipeline.mesh.exchange is not None:
        start = _labelled(pipeline.mesh.exchange.start, "exchange")
        pipeline.mesh.exchange.start = lambda tensors: _labelled(start(tensors), "exchange")  # type: ignore[method-assign]


def _labelled(function: Callable[P, R], part: str) -> Callable[P, R]:
    def call(*arguments: P.args, **keys: P.kwargs) -> R:
        with record_function(f"{PART}{part}"):
            return function(*arguments, **keys)

    return call


def shares_of_peak(pipeline: Pipeline, parts: dict[str, float]) -> dict[str, float]:
    """Attention's and the GEMMs' FLOP/s as shares of the device's dense bf16 peak; empty for a device whose peak is not known."""
    gpu = hardware.of_device(pipeline.mesh.device.name)
    if gpu is None:
        return {}
    config = pipeline.checkpoint.config("transformer")
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    size = work.ExpertSize(layers=config["num_layers"], heads=heads, head_dim=head_dim, ffn=config["ffn_dim"])
    one = work.forward_flops(work.tokens_of(pipeline.workload), size)
    share = _forwards(pipeline.plan) / pipeline.mesh.shape.per_replica
    flops = {"attention": (one.attention + one.cross_attention) * share, "gemm": one.gemm * share}
    return {part: count / parts[part] / gpu.peak("bf16") for part, count in flops.items() if parts[part]}


def _forwards(plan: Sequence[Step]) -> int:
    return sum(step.forwards for step in plan)


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Print one column per rank: seconds and share of the query by part."""
    table = Table(title=title)
    table.add_column("part")
    for row in rows:
        table.add_column(f"rank {row['rank']}", justify="right")
    for part in PARTS:
        cells = [f"{row['parts'][part]:.4f} s {row['parts'][part] / row['seconds']:6.1%}" for row in rows]
        table.add_row(part.replace("_", " "), *cells)
    table.add_row("query, while profiled", *(f"{row['seconds']:.4f} s       " for row in rows))
    for part in rows[0]["peak"]:
        table.add_row(f"{part}, of the bf16 peak", *(f"{row['peak'][part]:.1%}" for row in rows))
    console().print(table)
