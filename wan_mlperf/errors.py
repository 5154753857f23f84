"""The two errors that an entry point prints as one line: a user's mistake (exit code 2) and work that failed (exit code 3)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar

Name = TypeVar("Name", bound=str)


class BadInput(ValueError):
    """A user's mistake (exit code 2): what was wrong, the value and what is allowed, in one line, before weights are read."""


class Failed(RuntimeError):
    """The work failed on the way (exit code 3): one line that says where and why."""


def choose(what: str, value: str, allowed: Iterable[Name]) -> Name:
    """Return `value` if it is one of `allowed`, else raise BadInput that suggests the nearest one."""
    names = list(allowed)
    for name in names:
        if name == value:
            return name
    raise BadInput(f"{what}: {value!r} is not known{did_you_mean(value, names)}; allowed: {', '.join(names)}")


def did_you_mean(value: str, allowed: Iterable[str]) -> str:
    """Return ', did you mean ...?' for a misspelling of one of `allowed`, else nothing."""
    match = difflib.get_close_matches(str(value), list(allowed), n=1)
    return f", did you mean {match[0]!r}?" if match else ""
