"""A server of real ranks as a user starts it, and plain requests to it."""

from __future__ import annotations

import http.client
import json
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.replicas import jobs

# What MLCommons' client sends, in its order, but for the small workload of tests/replicas/jobs.py (recorded in November 2026).
NEGATIVE = "vivid colors, overexposed, static"
ROW: Mapping[str, Any] = {
    "prompt": "a person swimming in ocean",
    "negative_prompt": NEGATIVE,
    "size": "32x32",
    "seconds": 5.0,
    "fps": 8,
    "num_inference_steps": 2,
    "guidance_scale": 4.0,
    "guidance_scale_2": 3.0,
    "seed": 42,
    "num_frames": 5,
    "boundary_ratio": 0.875,
    "output_format": "auto",
    "response_format": "video_path",
}


class Answer:
    """A response that has been read."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status, self.body = status, body
        self.headers = {name.lower(): value for name, value in headers.items()}

    @property
    def json(self) -> Any:
        """Its body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """What was wrong, in OpenAI's form."""
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        return error


class Server:
    """A running server; `folder` is where it keeps its videos."""

    def __init__(self, recipe: Path, folder: Path, *more: str, fault: str = "", command: Sequence[str] | None = None) -> None:
        arguments = ["--recipe", str(recipe), "--port", "0", "--folder", str(folder), *more]
        self.folder = folder
        self.job = jobs.start("wan_mlperf.serve", arguments, fault=fault, command=command)

    def ready(self) -> Server:
        """Wait until it listens."""
        self.job.await_line("ready at http")
        found = re.search(r"ready at (http://\S+)", self.job.output)
        assert found is not None
        self.url = found[1]
        self.host, self.port = urlsplit(self.url).hostname or "", urlsplit(self.url).port or 0
        return self

    def ask(
        self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None, timeout: float = 120
    ) -> Answer:
        """Send one request on a connection of its own; `body` is sent as JSON unless it is bytes."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            if body is not None and not isinstance(body, bytes):
                body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    @contextmanager
    def running(self) -> Iterator[Server]:
        """Stop it at the end of the block; it must end in an orderly way."""
        try:
            yield self
            assert self.stop() == 0, self.job.output
        finally:
            self.job.kill()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it as a person does, and return the exit code."""
        self.job.process.send_signal(number)
        code, _ = self.job.finish()
        return code
