"""What the entry points share: exit codes, the one line of an error, starting the ranks, a progress bar."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from wan_mlperf.errors import BadInput, Failed, near

DONE, INVALID, BAD_INPUT, FAILED = 0, 1, 2, 3
EXIT_FILE = "WAN_MLPERF_EXIT_FILE"  # set by `launch`: where the first rank leaves its exit code


class Parser(argparse.ArgumentParser):
    """argparse whose errors are BadInput: one line, with a suggestion for a misspelt flag."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        wrong = message.removeprefix("unrecognized arguments: ").split()[0] if "unrecognized" in message else ""
        raise BadInput(f"{message}{near(wrong, flags)}; see --help")


def is_first_rank() -> bool:
    """True on rank 0 and outside torchrun."""
    return os.environ.get("RANK", "0") == "0"


def entry(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run `main(arguments)` and exit with its code; a user's mistake is one line and code 2, a failure one line and code 3."""
    try:
        code = main(sys.argv[1:])
    except BadInput as error:
        if is_first_rank():
            say(f"error: {one_line(error)}")
        code = BAD_INPUT
    except Failed as error:
        say(f"failed: {one_line(error)}")
        leave(FAILED)
    except KeyboardInterrupt:
        leave(128 + signal.SIGINT)
    except Exception:
        rank = os.environ.get("RANK")
        say(f"failed{f' on rank {rank}' if rank else ''}:")
        traceback.print_exc()
        leave(FAILED)
    finish(code)


def finish(code: int) -> NoReturn:
    """Exit after an orderly end. Under `launch` the first rank's code travels by file, so that torchrun reports no failure."""
    file = os.environ.get(EXIT_FILE)
    if file is None or "RANK" not in os.environ:
        sys.exit(code)
    if is_first_rank():
        Path(file).write_text(str(code))
    sys.exit(0)


def leave(code: int) -> NoReturn:
    """Exit at once, whatever other threads or collectives are doing; torchrun then ends the other ranks."""
    file = os.environ.get(EXIT_FILE)
    if file is not None and "RANK" in os.environ:
        Path(file).write_text(str(code))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def say(line: str) -> None:
    """Write a line to the standard error in one piece. `print` writes its end apart: another thread's line may come between."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())


def launch(module: str, arguments: Sequence[str], ranks: int) -> int:
    """Start `python -m module arguments` on `ranks` ranks of this host through torchrun's own library; return the exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The ranks say themselves what went wrong; the agent's log would only repeat it, at length.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    with tempfile.TemporaryDirectory(prefix="wan_mlperf-") as folder:
        file = Path(folder) / "code"
        os.environ[EXIT_FILE] = str(file)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id="wan_mlperf",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.2,
            event_log_handler="null",
        )
        try:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
        except ChildFailedError as error:
            if not file.exists():
                rank, failure = error.get_first_failure()
                say(f"failed: rank {rank} on {socket.gethostname()} ended with {_ending(failure.exitcode)}")
        except BaseException as error:
            number = getattr(error, "sigval", signal.SIGINT if isinstance(error, KeyboardInterrupt) else None)
            if number is None:
                raise
            if not file.exists():  # else rank 0 has said it
                say(f"stopped by {signal.Signals(number).name}")
            return 128 + int(number)
        finally:
            del os.environ[EXIT_FILE]
        return int(file.read_text()) if file.exists() else FAILED


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that choose and change a recipe, the same for every entry point."""
    parser.add_argument("--recipe", help="a YAML file or a name from configs/ (default: tiny without a GPU)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key of the recipe")
    parser.add_argument("--model", help="embedded, the hub name, or a Diffusers folder")
    parser.add_argument("--exact", action="store_true", help="turn every approximation off")


def recipe_from(options: argparse.Namespace, *, scenario: str = "singlestream") -> Any:
    """Load the recipe that the flags name. Raises BadInput."""
    from wan_mlperf.recipe import load_recipe

    overrides = list(options.set)
    if options.model is not None:
        overrides.append(f"model.checkpoint={options.model}")
    return load_recipe(options.recipe or default_recipe(scenario), overrides=overrides, exact=options.exact)


def default_recipe(scenario: str) -> str:
    """The recipe named for this device and scenario."""
    from wan_mlperf.kernels.device import gpu_count, probe

    if not gpu_count():
        return "tiny"
    return f"mi355x-{scenario}" if probe().arch.startswith("gfx") else "h100"


class Progress:
    """A bar on rank 0's terminal; plain lines, one per tenth, where there is no terminal; nothing on other ranks."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, max(1, total), 0
        self._shown = is_first_rank()
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
            say(f"{self._title}: {self._done}/{self._total}")

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
