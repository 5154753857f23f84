"""The report's drawings as inline SVG: only shapes, in a box of 100 x 100 that stretches. The text is in the HTML around them.

Text in a stretched SVG would be unreadable on a phone. Colours are the page's CSS variables. Hovering shows the values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

MOST_DOTS = 1500  # of longer runs, only every second, third, ... sample is drawn
NONE = "\N{EN DASH}"  # shown where a run has no value


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing, the labels below it from left to right, and the labels on its side from top to bottom."""

    svg: Markup
    across: tuple[str, ...]
    up: tuple[str, ...]


def seconds(value: float | None) -> str:
    """Format a time for easy reading: 27.38 s, 93 ms."""
    if value is None:
        return NONE
    if value >= 1:
        return f"{value:.2f} s" if value < 1000 else f"{value:.0f} s"
    return f"{value * 1e3:.0f} ms" if value >= 0.01 else f"{value * 1e3:.2f} ms"


def histogram(series: Sequence[Sequence[float]], marks: Mapping[str, float | None] | None = None) -> Chart:
    """Draw how many samples took how long. Several series share the bins, side by side. `marks` are vertical lines."""
    values = [value for one in series for value in one]
    shown = [mark for mark in (marks or {}).values() if mark is not None]
    low, high = _range([*values, *shown])
    bins = max(8, min(24, round(math.sqrt(len(values)) * 1.5)))
    counts = [[0] * bins for _ in series]
    for count, one in zip(counts, series, strict=True):
        for value in one:
            count[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    top = max(max(count) for count in counts)
    step, parts = 100 / bins, []
    for number, count in enumerate(counts):
        width = step * 0.86 / len(series)
        for index, height in enumerate(count):
            if height:
                left = index * step + step * 0.07 + number * width
                begin, end = low + (high - low) * index / bins, low + (high - low) * (index + 1) / bins
                tall = 100 * height / top
                parts.append(
                    f'<rect class="s{number}" x="{left:.3f}" y="{100 - tall:.3f}" width="{width:.3f}" height="{tall:.3f}">'
                    f"<title>{seconds(begin)} to {seconds(end)}: {height}</title></rect>"
                )
    for name, mark in (marks or {}).items():
        if mark is not None:
            at = 100 * (mark - low) / (high - low)
            parts.append(f'<path class="mark" d="M{at:.3f} 0V100"><title>{Markup.escape(name)}: {seconds(mark)}</title></path>')
    return Chart(svg=_svg(parts), across=(seconds(low), seconds((low + high) / 2), seconds(high)), up=(str(top), "0"))


def over_run(series: Sequence[Sequence[float]], mark: float | None = None) -> Chart:
    """Draw each sample's time, in the order of the run. `mark` is a horizontal line."""
    values = [value for one in series for value in one]
    low, high = _range([*values, *([] if mark is None else [mark])])
    longest = max(len(one) for one in series)
    parts = []

    def height(value: float) -> float:
        return 100 - 100 * (value - low) / (high - low)

    if mark is not None:
        parts.append(f'<path class="mark" d="M0 {height(mark):.3f}H100"><title>{seconds(mark)}</title></path>')
    for number, one in enumerate(series):
        for index in range(0, len(one), -(-longest // MOST_DOTS)):
            value = one[index]
            x, y = 100 * (index + 0.5) / longest, height(value)
            parts.append(
                f'<path class="dot s{number}" d="M{x:.3f} {y:.3f}h0"><title>{index + 1}: {seconds(value)}</title></path>'
            )
    return Chart(svg=_svg(parts), across=("1", f"{longest} samples"), up=(seconds(high), seconds(low)))


def shares(parts: Mapping[str, float]) -> Markup:
    """Draw one bar with the parts' shares. A part's colour depends on its position."""
    total = sum(parts.values()) or 1.0
    pieces, left = [], 0.0
    for number, (name, value) in enumerate(parts.items()):
        width = 100 * value / total
        pieces.append(
            f'<rect class="p{number}" x="{left:.3f}" y="0" width="{max(0.0, width - 0.15):.3f}" height="100">'
            f"<title>{Markup.escape(name)}: {seconds(value)}, {width:.1f} %</title></rect>"
        )
        left += width
    return _svg(pieces)


def stacked(parts: Mapping[str, float], longest: float, band: tuple[float, float]) -> Markup:
    """Draw one bar of the parts' seconds on a scale of 0 to `longest`, with the band of their sum as a line at its end."""
    pieces, left = [], 0.0
    for number, (name, value) in enumerate(parts.items()):
        width = 100 * value / longest
        pieces.append(
            f'<rect class="p{number}" x="{left:.3f}" y="0" width="{max(0.0, width - 0.1):.3f}" height="100">'
            f"<title>{Markup.escape(name)}: {seconds(value)}</title></rect>"
        )
        left += width
    begin, end = (100 * one / longest for one in band)
    pieces.append(
        f'<path class="mark" d="M{begin:.3f} 50H{end:.3f}"><title>{seconds(band[0])} to {seconds(band[1])}</title></path>'
    )
    return _svg(pieces)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * 0.02 or max(abs(high), 1e-9) * 0.05
    return max(0.0, low - pad), high + pad


def _svg(parts: Sequence[str]) -> Markup:
    return Markup('<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">' + "".join(parts) + "</svg>")
