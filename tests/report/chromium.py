"""Opens a page in headless Chromium at a given width, over the DevTools pipe, so no driver package is needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any


def find() -> str:
    """Return Chromium's command. Without one, an AssertionError says what to install."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    raise AssertionError("this test needs Chromium: on Debian, apt-get install chromium")


class Browser:
    """One Chromium. `console` collects every console message of a page, and every request to elsewhere than `home`."""

    def __init__(self, *, home: str = "file:") -> None:
        self.console: list[str] = []
        self._home = home
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # its helpers write a little longer
        read_by_chromium, self._to = os.pipe()
        self._from, written_by_chromium = os.pipe()
        command = [find(), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        command += [f"--user-data-dir={self._profile.name}", "--disable-dev-shm-usage", "--hide-scrollbars"]
        wrapper = 'exec 3<&"$0" 4>&"$1"; shift; exec "$@"'  # Chromium reads from 3 and writes to 4
        self._process = subprocess.Popen(
            ["bash", "-c", wrapper, str(read_by_chromium), str(written_by_chromium), *command],
            pass_fds=(read_by_chromium, written_by_chromium),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_by_chromium)
        os.close(written_by_chromium)
        self._number, self._rest, self._session = 0, b"", ""
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one DevTools command and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def open(self, page: Path | str, *, width: int, dark: bool = False) -> None:
        """Load a file or an address and wait for it."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self._loaded = False
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while not self._loaded:
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression on the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def await_true(self, expression: str, *, timeout: float = 120.0) -> None:
        """Wait until a JavaScript expression is true."""
        until = time.monotonic() + timeout
        while not self.evaluate(expression):
            assert time.monotonic() < until, f"never true: {expression}"
            time.sleep(0.03)

    def type(self, selector: str, text: str) -> None:
        """Put the focus on an element and type into it."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, code: int, modifiers: int = 0) -> None:
        """Press a key and let it go; `code` is its Windows virtual key code."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, modifiers=modifiers)

    def screenshot(self, file: Path) -> None:
        """Save the whole page as a PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = os.read(self._from, 1 << 20)
            assert block, "Chromium ended"
            self._rest += block
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.loadingFailed" and parameters.get("canceled"):
            pass  # a page that changes a video's source has asked for it
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed"):
            self.console.append(json.dumps(parameters))
        elif method == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if not url.startswith((self._home, "blob:", "data:", "about:")):
                self.console.append(f"asks for {url}")
        return message
