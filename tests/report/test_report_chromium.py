"""report.html in headless Chromium: no console message, nothing fetched, nothing wider than the window, a screenshot."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as imageio
import pytest

from sut.prompts import benchmark_prompts
from tests.report.chromium import Browser
from tests.report.test_report import write
from tests.run_folders import videos
from wan_mlperf.report import __main__ as report
from wan_mlperf.report import run_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One page of each kind."""
    top = tmp_path_factory.mktemp("pages")
    performance = write(top / "performance", workload_is_mlperf=True, latency_early_stopping_s=25.0)
    accuracy = write(top / "accuracy", scenario="offline", mode="accuracy")
    videos(accuracy, benchmark_prompts()[:12])
    compliance = {"test": "TEST04", "passed": False, "verdict": "TEST FAIL: one repeated sample is 40.0% faster"}
    compliance |= {"reference": "20260101-000000-singlestream-performance", "reference_score": 0.0365, "test_score": 0.051}
    test04 = write(top / "test04", compliance=compliance)
    for folder in (performance, accuracy, test04):
        run_folder.write(folder)
    assert report.main([str(performance), str(test04)]) == 0
    found = {folder.name: folder / "report.html" for folder in (performance, accuracy, test04)}
    return {**found, "compare": test04 / "compare.html"}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_pages_render(pages: dict[str, Path], tmp_path: Path, width: int, dark: bool) -> None:
    with Browser() as browser:
        for name, page in pages.items():
            browser.open(page, width=width, dark=dark)
            picture = tmp_path / f"{name}.png"
            browser.screenshot(picture)
            assert browser.console == [], name
            assert browser.evaluate("document.documentElement.scrollWidth") == width, name
            assert browser.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 0)") is True, name
            small = "[...document.querySelectorAll('main *')].filter(one => one.innerText"
            small += " && parseFloat(getComputedStyle(one).fontSize) < 12).length"
            assert browser.evaluate(small) == 0, name
            # Charts must have room: a collapsed one would be a page without an error.
            assert browser.evaluate("[...document.querySelectorAll('svg')].every(one => one.clientHeight >= 30)") is True, name
            pixels = imageio.imread(picture)
            assert pixels.shape[1] == width and pixels.shape[0] > 1000
            assert (pixels[..., :3].mean() < 110) == dark
