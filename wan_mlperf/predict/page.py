"""Forecasts -> one HTML page: stacked bars on one scale, a table of seconds, the rates behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from wan_mlperf import pages
from wan_mlperf.pages import charts
from wan_mlperf.predict.forecast import Forecast
from wan_mlperf.predict.prices import PARTS


def render(forecasts: Sequence[Forecast]) -> str:
    """Return the page."""
    longest = max(one.prediction.band[1] for one in forecasts)
    bars = [
        charts.stacked({_words(name): one.prediction.parts[name] for name in PARTS}, longest, one.prediction.band)
        for one in forecasts
    ]
    rows: list[tuple[Forecast, Markup]] = list(zip(forecasts, bars, strict=True))
    return pages.template(Path(__file__).parent, "predict.html").render(
        title="Predicted seconds of a video",
        rows=rows,
        parts=[(name, _words(name)) for name in PARTS],
        longest=longest,
        kernels={rate.kernel: rate for one in forecasts for rate in one.prediction.kernels.values()},
    )


def _words(name: str) -> str:
    return name.replace("_", " ")
