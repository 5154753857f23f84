"""The page of a search: the front of seconds against error, with each point's plan as a strip of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from wan_mlperf.files import atomic_write
from wan_mlperf.pages import template
from wan_mlperf.step_plan import Step

SHOWN = 24  # points of the front with their plans
CLASSES = {"sdpa": "p4", "sage_fp8": "p1", "sage_fp4": "p2"}
LEGEND = {"sdpa": "bf16 attention", "sage_fp8": "FP8 attention", "sage_fp4": "FP4 attention"}


def write_page(file: Path, record: Mapping[str, Any], plan: Sequence[Step]) -> None:
    """Write search.html from what search.json holds; `plan` says which expert each step has."""
    front = record["front"]
    every = max(1, -(-len(front) // SHOWN))
    shown = [point for index, point in enumerate(front) if index % every == 0 or point == record["chosen"]]
    page = template(Path(__file__).parent, "search.html").render(
        title="Search for a schedule",
        record=record,
        drawing=_drawing(record),
        rows=[{**point, "strip": strip(point["schedule"], plan), "chosen": point == record["chosen"]} for point in shown],
        own={**record["own"], "strip": strip(record["own"]["schedule"], plan)},
        outcomes=[{**one, "strip": strip(one["schedule"], plan)} for one in record["outcomes"]],
        legend=LEGEND,
        classes=CLASSES,
        embedded=bool(record["outcomes"] and record["outcomes"][0]["shown"]),
    )
    atomic_write(file, page)


def strip(schedule: Mapping[str, Any], plan: Sequence[Step]) -> Markup:
    """A plan as one cell per step: colour by kernel, half height without guidance, hollow for an earlier change."""
    cells = []
    for step in plan:
        kernel, reused, off = schedule["attention"][step.index], step.index in schedule["reuse"], step.index in schedule["off"]
        what = "applies an earlier change again" if reused else LEGEND.get(kernel, kernel)
        text = f"step {step.index}, {step.expert.replace('_', ' ')}: {what}{', without guidance' if off else ''}"
        kind = "again" if reused else CLASSES.get(kernel, "p5")
        cells.append(f'<i class="{kind}{" half" if off else ""}" title="{Markup.escape(text)}"></i>')
    formats = f"GEMMs {schedule['high_noise']} and {schedule['low_noise']}"
    label = f"{len(plan)} steps, {len(schedule['reuse'])} applied again, {len(schedule['off'])} without guidance, {formats}"
    return Markup('<div class="steps" role="img" aria-label="{}">{}</div>').format(label, Markup("".join(cells)))


def _drawing(record: Mapping[str, Any]) -> dict[str, object]:
    """The front as SVG in a box of 100 x 100, with the ends of both axes."""
    points = [*record["front"], record["own"]]
    costs = [point["cost"] for point in points]
    errors = [point["error"] for point in points if point["error"] == point["error"]]
    low, high, top = min(costs), max(costs), max(errors)

    def at(cost: float, error: float) -> str:
        return f"{100 * (cost - low) / ((high - low) or 1):.3f} {100 - 100 * error / (top or 1):.3f}"

    parts = []
    for point in record["front"]:
        name = f"{point['cost']:.4g} {record['unit']}: error {point['error']:.4f}"
        parts.append(f'<path class="dot s0" d="M{at(point["cost"], point["error"])}h0"><title>{name}</title></path>')
    for one in record["outcomes"]:
        name = Markup.escape(f"{one['name']}: measured {one['measured']:.4f}")
        parts.append(f'<path class="dot s1" d="M{at(one["cost"], min(one["measured"], top))}h0"><title>{name}</title></path>')
    svg = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}</svg>'
    unit = record["unit"]
    return {"svg": Markup(svg), "across": (f"{low:.4g} {unit}", f"{high:.4g} {unit}"), "up": (f"{top:.3f}", "0")}
