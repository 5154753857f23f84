"""Running an entry point in this process as `python -m` would: its exit code and what it printed, nothing raised."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn
from unittest import mock

from wan_mlperf import process

SMALL = ("--steps=2", "--size=32x32", "--frames=5")  # of generate


@dataclass(frozen=True)
class Ended:
    """What became of a command."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of the standard error. Fails if there is another, or a traceback."""
        (line,) = self.err.splitlines()
        assert "Traceback" not in line
        return line


def run(main: Callable[[Sequence[str]], int], *arguments: str) -> Ended:
    """Call `process.entry(main)` with these arguments."""

    def leave(code: int) -> NoReturn:  # the real one ends the process of the tests
        raise SystemExit(code)

    out, err = io.StringIO(), io.StringIO()
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in process.STOPS}
    code: Any = None
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "argv", ["command", *arguments]),
            mock.patch.object(process, "leave", leave),
        ):
            process.entry(main)
    except SystemExit as end:
        code = end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert isinstance(code, int)
    return Ended(code, out.getvalue(), err.getvalue())


def refused(end: Ended, *words: str) -> None:
    """Exit code 2 and one line that holds these words."""
    assert (end.code, end.out) == (2, ""), end
    assert end.line.startswith("error: ")
    for word in words:
        assert word in end.line, end.line
