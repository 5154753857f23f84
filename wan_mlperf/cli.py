"""What the commands share: flags, and a progress bar."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from wan_mlperf import process, ranks
from wan_mlperf.errors import BadInput, did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse whose errors are BadInput: one line, with a suggestion for a misspelt flag."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        wrong = message.removeprefix("unrecognized arguments: ").split()[0] if "unrecognized" in message else ""
        raise BadInput(f"{message}{did_you_mean(wrong, flags)}; see --help")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that choose and change a recipe, the same for every entry point."""
    parser.add_argument("--recipe", help="a YAML file or a name from configs/ (default: tiny without a GPU)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key of the recipe")
    parser.add_argument("--model", help="embedded, the hub name, or a Diffusers folder")
    parser.add_argument("--exact", action="store_true", help="turn every approximation off")


class Progress:
    """A bar on rank 0's terminal; plain lines, one per tenth, where there is no terminal; nothing on other ranks."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, max(1, total), 0
        self._shown = ranks.is_first()
        self._bar: Any = None
        if self._shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(title, total=self._total)

    @property
    def done(self) -> int:
        """How many are done."""
        return self._done

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, total=max(self._total, self._done))
        elif self._shown and (self._done * 10 // self._total > (self._done - 1) * 10 // self._total):
            process.say(f"{self._title}: {self._done}/{self._total}")

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
