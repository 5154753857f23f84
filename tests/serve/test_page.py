"""The page in headless Chromium, against a server with the embedded model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as imageio
import pytest

from tests.report.chromium import Browser
from tests.serve.client import Server

pytestmark = pytest.mark.slow

PROMPTS = {1280: "a red circle moving left on a blue background", 400: '<img src=x onerror="document.title=1"> a green square'}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    with Server(Path("tiny"), folder / "videos").ready().running() as running:
        yield running


def progress_until_played(browser: Browser) -> list[float]:
    """Follow the queue's bar until the video has been played to its end; return what the bar showed."""
    browser.evaluate("window.played = false; player.addEventListener('ended', () => window.played = true)")
    seen: list[float] = []
    until = time.monotonic() + 120
    while not browser.evaluate("window.played"):
        assert time.monotonic() < until, (seen, browser.console)
        value = browser.evaluate("document.querySelector('#queue progress')?.value ?? -1")
        if value >= 0 and value not in seen:
            seen.append(value)
        time.sleep(0.02)
    return seen


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_a_video_from_prompt_to_its_last_frame(server: Server, tmp_path: Path, width: int, dark: bool) -> None:
    with Browser(home=server.url) as browser:
        browser.open(server.url, width=width, dark=dark)
        browser.await_true("document.querySelectorAll('#strip li').length === 20")
        browser.type("#prompt", PROMPTS[width])
        browser.press("Enter", code=13, modifiers=2)  # Ctrl
        seen = progress_until_played(browser)
        assert len(seen) >= 3 and seen == sorted(seen), seen
        browser.await_true("document.querySelector('#now-state').textContent === 'finished'")
        # The whole file has taken the stream's place, and stands in the gallery.
        browser.await_true("document.querySelector('#player').currentSrc.endsWith('/content')")
        browser.await_true("document.querySelector('#player').videoWidth === 64")
        browser.await_true("document.querySelector('#gallery video')?.duration > 2")
        assert browser.evaluate("document.querySelector('#now-prompt').textContent") == PROMPTS[width]
        assert browser.evaluate("document.querySelector('#gallery .text').textContent") == PROMPTS[width]
        assert browser.evaluate("document.querySelectorAll('main img').length") == 0
        assert browser.evaluate("document.title") == "Wan2.2 text to video"
        assert browser.evaluate("document.documentElement.scrollWidth") == width
        small = "[...document.querySelectorAll('body *')].filter(one => one.innerText && one.offsetParent"
        assert browser.evaluate(f"{small} && parseFloat(getComputedStyle(one).fontSize) < 12).length") == 0
        browser.screenshot(tmp_path / "page.png")
        assert (imageio.imread(tmp_path / "page.png")[..., :3].mean() < 110) == dark
        assert browser.console == []


def test_the_stream_plays_before_the_file_is_there(server: Server) -> None:
    """The first source of the player is the stream; that it began before the end is told by the server's own record."""
    with Browser(home=server.url) as browser:
        browser.open(server.url, width=1280)
        browser.evaluate(
            "window.sources = []; const film = document.querySelector('#player');"
            "film.addEventListener('loadstart', () => window.sources.push(film.currentSrc))"
        )
        browser.type("#prompt", "a yellow star")
        browser.evaluate("document.querySelector('#make').click()")
        progress_until_played(browser)
        sources = browser.evaluate("JSON.stringify(window.sources)")
        assert json.loads(sources)[0].endswith("/stream"), sources
        assert browser.console == []


def test_by_keyboard_and_for_a_screen_reader(server: Server) -> None:
    """Every control has a name, what changes is announced, and Tab reaches the form, Cancel and Delete."""
    with Browser(home=server.url) as browser:
        browser.open(server.url, width=1280)
        browser.await_true("document.querySelectorAll('#gallery li').length > 0")
        unnamed = browser.evaluate(
            "[...document.querySelectorAll('button, input:not([aria-hidden]), textarea, video, progress')].filter(one => "
            "!one.labels?.length && !one.ariaLabel && !one.getAttribute('aria-labelledby') && !one.textContent.trim()).length"
        )
        assert unnamed == 0
        reached = set()
        browser.evaluate("document.body.focus()")
        for _ in range(40):
            browser.press("Tab", code=9)
            reached.add(browser.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        assert {"prompt", "make", "Delete"} <= reached, reached
        assert browser.evaluate("document.querySelectorAll('[aria-live], [role=alert]').length") == 2
        browser.type("#prompt", "   ")
        browser.evaluate("document.querySelector('#ask').requestSubmit()")
        browser.await_true("document.querySelector('#problem').textContent.includes('prompt')")


def test_deleting_from_the_gallery(server: Server) -> None:
    with Browser(home=server.url) as browser:
        browser.open(server.url, width=400)
        browser.await_true("document.querySelectorAll('#gallery li').length > 0")
        before = browser.evaluate("document.querySelectorAll('#gallery li').length")
        gone = browser.evaluate("document.querySelector('#gallery li').dataset.id")
        browser.evaluate("document.querySelector('#gallery li button').click()")
        browser.await_true(f"document.querySelectorAll('#gallery li').length === {before - 1}")
        assert server.ask("GET", f"/v1/videos/{gone}").status == 404
        assert browser.console == []
