"""Forecasts on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from wan_mlperf.predict import floor, work
from wan_mlperf.predict.counting import Counts
from wan_mlperf.predict.forecast import Forecast
from wan_mlperf.predict.memory import Fit, need_of
from wan_mlperf.predict.prices import PARTS, Prices
from wan_mlperf.predict.rehearsal import RankCounts
from wan_mlperf.step_plan import Step


def console() -> Console:
    """The console for tables: as wide as the terminal, or 120 columns."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)


def table(title: str, *headings: str, words: int = 1) -> Table:
    """A table whose first `words` columns are text."""
    made = Table(title=title, title_justify="left", min_width=min(len(title), 110))
    for number, heading in enumerate(headings):
        made.add_column(heading, justify="left" if number < words else "right")
    return made


def show(one: Forecast, *, details: bool) -> None:
    """Print one forecast: seconds by part, the band, memory, and the rates that it rests on."""
    low, high = one.prediction.band
    size = f"{one.workload.frames} frames of {one.workload.height} x {one.workload.width}, {one.workload.steps} steps"
    made = table(f"{one.recipe} on {one.gpus} x {one.gpu.name}: {one.shape}; {size}", "part", "s", "%")
    for name in PARTS:
        seconds = one.prediction.parts[name]
        made.add_row(name.replace("_", " "), f"{seconds:.3f}", f"{100 * seconds / one.prediction.seconds:.1f}")
    made.add_section()
    made.add_row("one video (SingleStream)", f"{one.prediction.seconds:.2f}", f"{low:.2f} to {high:.2f}")
    made.add_row("Offline, samples/s", f"{one.samples_per_second:.4f}", f"{one.shape.replicas / high:.4f} to " + _rate(one, low))
    if (need := one.need) is not None:
        made.add_row("memory of a rank, GB", f"{need.total:.1f}", f"of {one.gpu.memory / 1e9:.1f}")
    warm, cold = one.load_s
    made.add_row("loading, s", f"{warm:.0f} warm", f"{cold:.0f} from disk")
    console().print(made)
    for name, rate in one.prediction.kernels.items():
        kind = "from whole runs" if rate.fitted else "the kernel alone"
        print(f"  {name}: {rate.kernel}, {rate.flops / 1e12:.0f} TFLOP/s, {kind} ({rate.source}, {rate.date})")
    if one.subject.recipe.compile.experts:
        print("  The first query also compiles, minutes with an empty cache: not predicted.")
    if details:
        for rank in one.ranks:
            _show_rank(rank)


def _rate(one: Forecast, seconds: float) -> str:
    return f"{one.shape.replicas / seconds:.4f}"


def _show_rank(rank: RankCounts) -> None:
    need = need_of(rank)
    weights = ", ".join(f"{name.replace('_', ' ')} {size:.1f}" for name, size in need.weights.items())
    made = table(
        f"rank {rank.rank}: weights in GB {weights}",
        "stage",
        "calls",
        "TFLOP",
        "GB read",
        "GB written",
        "GB sent",
        "messages",
        "peak GB",
    )
    for name, counts in rank.stages.items():
        made.add_row(
            name.replace("_", " "),
            str(sum(counts.calls.values())),
            f"{sum(counts.flops.values()) / 1e12:,.1f}",
            f"{counts.read / 1e9:,.0f}",
            f"{counts.written / 1e9:,.0f}",
            f"{sum(counts.sent.values()) / 1e9:,.3f}",
            f"{sum(counts.messages.values()):,}",
            f"{counts.peak / 1e9:.1f}",
        )
    console().print(made)
    for name, flops in sorted(rank.total.flops.items(), key=lambda one: -one[1]):
        shapes = rank.total.shapes.get(name, "")
        print(f"  {name}: {flops / 1e12:,.1f} TFLOP in {rank.total.calls[name]:,} calls{f', such as {shapes}' if shapes else ''}")
    for group, sent in rank.total.sent.items():
        print(f"  group {group}: {sent / 1e9:,.3f} GB sent in {rank.total.messages[group]:,} messages")


def show_blocks(blocks: Mapping[str, Counts]) -> None:
    """Print what one block of the experts moves and sends in one forward, by kind of step."""
    made = table("one block, one branch of guidance, on the first rank", "step", "MB read", "MB written", "MB sent", "messages")
    for name, counts in blocks.items():
        sent, messages = sum(counts.sent.values()), sum(counts.messages.values())
        row = f"{counts.read / 1e6:,.1f}", f"{counts.written / 1e6:,.1f}", f"{sent / 1e6:,.1f}", f"{messages:,.0f}"
        made.add_row(name.replace("_", " "), *row)
    console().print(made)


def show_fits(one: Forecast, fits: Sequence[Fit]) -> None:
    """Print the GB that a rank needs for each way of decoding and each format of the experts."""
    formats = list(dict.fromkeys(fit.gemm for fit in fits))
    title = f"GB a rank of {one.recipe} needs of {one.gpu.name}'s {one.gpu.memory / 1e9:.1f}; * does not fit"
    made = table(title, "decode", "chunk", *(f"experts {name}" for name in formats), words=1)
    for dtype, chunk in dict.fromkeys((fit.vae_dtype, fit.chunk) for fit in fits):
        row = [fit for fit in fits if (fit.vae_dtype, fit.chunk) == (dtype, chunk)]
        cells = [f"{fit.need.total:.1f}{'*' if fit.need.lacks(one.gpu) else ''}" for fit in row]
        made.add_row(dtype, str(chunk), *cells)
    console().print(made)


def show_side_by_side(forecasts: Sequence[Forecast]) -> None:
    """Print several forecasts, one per row."""
    made = table(
        "side by side", "recipe", "hardware", "s", "band", "samples/s", *(name.replace("_", " ") for name in PARTS), words=2
    )
    for one in forecasts:
        low, high = one.prediction.band
        made.add_row(
            one.recipe,
            f"{one.gpus} x {one.gpu.name}",
            f"{one.prediction.seconds:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{one.samples_per_second:.4f}",
            *(f"{one.prediction.parts[name]:.2f}" for name in PARTS),
        )
    console().print(made)


def show_floor(prices: Prices, plan: Sequence[Step], recipe: str) -> None:
    """Print the lower bound by part, and the exchange of each mesh at the peak of the links."""
    bound = floor.floor_of(prices, plan)
    gpus = prices.shape.per_replica
    predicted = prices.plan(plan)
    title = f"{recipe}, one video on {gpus} x {prices.gpu.name} ({prices.shape}) at dense peaks"
    made = table(title, "part", "lower bound, s", "predicted, s")
    for name in PARTS:
        made.add_row(name.replace("_", " "), f"{bound.parts[name]:.3f}", f"{predicted.parts[name]:.3f}")
    made.add_section()
    made.add_row("all", f"{bound.total:.3f}", f"{predicted.seconds:.3f}")
    console().print(made)
    title = "what one rank sends per guided step, and its time at the peak of the links that it uses"
    meshes = table(title, "mesh", "MB", "ms", "s per video")
    for cfg in (1, 2):
        ulysses = gpus // cfg
        if gpus % cfg == 0 and ulysses > 1 and prices.size.heads % ulysses == 0:
            sent, seconds = floor.exchange_of(prices, replace(prices.shape, cfg=cfg, ulysses=ulysses, ring=1))
            whole = seconds * sum(step.forwards for step in plan) / 2  # a step's two forwards
            row = f"{sent / 1e6:,.0f}", f"{seconds * 1e3:.1f}", f"{whole:.2f}"
            made_of = f"CFG {cfg} x Ulysses {ulysses}"
            meshes.add_row(made_of, *row)
    console().print(meshes)
    size = prices.size
    numbers = size.layers * (8 * size.width**2 + 2 * size.width * size.ffn)
    print(
        f"One expert's linear layers, read once per forward: bf16 {2 * numbers / 1e9:.1f} GB, MXFP4 {numbers * 17 / 32e9:.1f} GB."
    )
    flops = work.forward_flops(work.tokens_of(prices.workload, size), size)
    forwards = sum(step.forwards for step in plan)
    print(
        f"FLOPs of the video: attention {forwards * flops.attention / 1e15:.2f} PFLOP, linear layers "
        f"{(forwards * flops.gemm + 4 * work.text_keys_flops(size)) / 1e15:.2f}, decode "
        f"{work.decode_flops(prices.workload) / 1e15:.2f}."
    )
