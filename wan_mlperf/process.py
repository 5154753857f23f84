"""How a process of ours ends: exit codes, signals, and the one line of an error.

Only our own bugs give a traceback. What the system refuses (a full disk, an unreadable file, no memory) is one line that names
the file and the reason.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from wan_mlperf import files, ranks
from wan_mlperf.errors import BadInput, Failed

DONE, INVALID, BAD_INPUT, FAILED = 0, 1, 2, 3
CODE = "code"  # file in a job's folder: where the first rank leaves its exit code
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # they end a job; torchrun passes them on to its ranks
SAME_SIGNAL_S = 1.0
FIRST_SAYS_S = 2.0  # torchrun ends all ranks once one has left, so the first rank must have said why by then


class Stopped(BaseException):
    """A signal ends this process. Raised in the main thread, so that everything on the way out is cleaned up."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def entry(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run `main(arguments)` and exit with its code. A user's mistake is one line and code 2, a failure one line and code 3."""
    _prepare()
    if problem := ranks.problem():
        say(f"error: {problem}")  # whatever rank this may be
        sys.exit(BAD_INPUT)
    try:
        code = main(sys.argv[1:])
        _flush()
    except BadInput as error:
        if ranks.is_first():  # all ranks raise it (replicas/together.py)
            say(f"error: {one_line(error)}")
        else:
            time.sleep(FIRST_SAYS_S)
        code = BAD_INPUT
    except (KeyboardInterrupt, Stopped) as error:
        number = getattr(error, "number", signal.SIGINT)
        if ranks.is_first():
            say(f"stopped by {signal.Signals(number).name}")
        leave(128 + number)
    except BrokenPipeError as error:
        if error.filename is None:  # whoever read our output has left, such as `head`
            _drop_output()
            leave(128 + signal.SIGPIPE)
        leave_failed(error)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("", "wan_mlperf", "sut"):  # a mistake of ours
            leave_failed(error)
        say(f"error: package {error.name} is not installed; allowed: .venv/bin/python after `make run`, or `make install` first")
        leave(BAD_INPUT)
    except Exception as error:
        leave_failed(error)
    if code == BAD_INPUT:
        files.take_back()
    finish(code)


def leave_failed(error: Exception) -> NoReturn:
    """Say why in one line, or with a traceback if it is our bug, and exit."""
    rank = f" on rank {ranks.rank()}" if ranks.under_torchrun() else ""
    line = why(error)
    if line is None:
        say(f"failed{rank}:")
        traceback.print_exception(error)
    else:
        say(f"failed{rank}: {line}" if rank and not isinstance(error, Failed) else f"failed: {line}")
    leave(FAILED)


def why(error: BaseException) -> str | None:
    """Return the line for a failure that is not our bug: the file and the reason, or the memory that was missing."""
    if isinstance(error, Failed):
        return one_line(error)
    if (memory := _memory(error)) is not None:
        return memory
    if isinstance(error, OSError):
        name = error.filename if error.filename is not None else _file_of(error)
        place = "" if name is None else f"{shown(str(name))}: "
        cause = "" if error.strerror else _cause(error)
        return f"{place}{one_line(Exception(error.strerror or error))}{cause}"
    return None


def _cause(error: BaseException) -> str:
    """Return the system's reason for an error that a library has put in its own words."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return f" ({seen.strerror})"
        seen = seen.__cause__ or seen.__context__
    return ""


def _file_of(error: BaseException) -> str | None:
    """Return the file of an error that names none, such as those of `read` and `write`: the frames that called them know it."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        values = list(frame.f_locals.values())
        names = [
            one.name
            for one in values
            if isinstance(one, io.FileIO | io.BufferedIOBase | io.TextIOWrapper) and hasattr(one, "name")
        ]
        names += [str(one) for one in values if isinstance(one, Path)]
        for name in names:
            if isinstance(name, str) and not name.startswith("/proc/self/fd/"):
                return name
    return None


def _memory(error: BaseException) -> str | None:
    """Return how much memory was asked for and how much there was, for an error that says there was too little."""
    text = one_line(error)
    asked = re.search(r"(?:tried to allocate|allocate) ([\d.]+ ?[KMGT]?i?B(?:ytes)?|\d+ bytes)", text, re.I)
    kinds = ("out of memory", "can't allocate memory", "cannot allocate memory", "unable to allocate")
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and any(one in text.lower() for one in kinds)):
        return None
    free = re.search(r"(?:GPU \d+ has a )?total capacity of .*? is free", text)
    there = free[0] if free else _memory_here()
    return f"out of memory: {f'asked for {_size(asked[1])}' if asked else text or 'nothing more is known'}; {there}"


def _size(text: str) -> str:
    number, _, unit = text.partition(" ")
    return f"{int(number) / 2**30:.2f} GiB" if unit.lower() == "bytes" and number.isdigit() else text


def _memory_here() -> str:
    found = []
    with contextlib.suppress(OSError, KeyError, ValueError):
        values = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M))
        found.append(
            f"{int(values['MemAvailable']) / 2**20:.1f} of {int(values['MemTotal']) / 2**20:.1f} GiB are free on this host"
        )
    with contextlib.suppress(OSError, ValueError):  # the container's limit
        most, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        found.append(f"{(most - used) / 2**30:.1f} of {most / 2**30:.1f} GiB in this container")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        found.append(f"a process may have {limit / 2**30:.1f} GiB (ulimit -v)")
    return ", ".join(found) or "what is free is not known"


def _prepare() -> None:
    """Make sure that no name a user chose can break the printing of a line, and that signals unwind the main thread."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def stop(number: int, _frame: object) -> None:
        leave_at_next_signal(128 + number)
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    for number in STOPS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # an ignored one stays ignored: nohup
            signal.signal(number, stop)


def leave_at_next_signal(code: int | None = None) -> None:
    """From now on a signal, such as a second Ctrl-C, ends this process at once: it is ending anyway, and may hang.

    Not within SAME_SIGNAL_S: a terminal, `timeout` and a parent may all pass on the same signal. `code`: the exit code, if it is
    known already, else that of the signal.
    """
    since = time.monotonic()

    def handle(number: int, _frame: object) -> None:
        if time.monotonic() - since > SAME_SIGNAL_S:
            leave(128 + number if code is None else code)

    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # an ignored signal stays ignored: nohup
            signal.signal(number, handle)


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError as error:
        _drop_output()
        if isinstance(error, BrokenPipeError):
            raise
        raise OSError(error.errno or 0, error.strerror or str(error), "standard output") from None


def _drop_output() -> None:
    """Drop output that cannot be written, so that nothing fails because of it any more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def finish(code: int) -> NoReturn:
    """Exit normally. Under `launch`, the first rank leaves its code in a file, so that torchrun reports no failure."""
    ranks.drop_torchrun_folders()
    leave_at_next_signal(code)  # Python's own end takes a moment
    job = os.environ.get(files.JOB)
    if job is None or not ranks.under_torchrun():
        sys.exit(code)
    if ranks.is_first():
        (Path(job) / CODE).write_text(str(code))
    sys.exit(0)


def leave(code: int) -> NoReturn:
    """Exit at once, whatever other threads or collectives are doing. torchrun then ends the other ranks."""
    with contextlib.suppress(ValueError):  # not the main thread
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)
    files.clean_up()
    ranks.drop_torchrun_folders()
    job = os.environ.get(files.JOB)
    if job is not None and ranks.under_torchrun():
        with contextlib.suppress(OSError):
            (Path(job) / CODE).write_text(str(code))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def say(line: str) -> None:
    """Write a line to standard error in one piece. `print` writes the newline separately, so lines of other threads could mix."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody listens, and there is no other place to say so
        sys.stderr.write(f"{shown(line)}\n")
        sys.stderr.flush()


def tell(line: str) -> None:
    """Print a line of the result. Names with control characters or invalid text do no harm."""
    print(shown(line), flush=True)


def note(line: str) -> None:
    """Say something that is not an error, once per job: ranks that `launch` started leave it to the launcher."""
    if ranks.is_first() and not (ranks.under_torchrun() and files.JOB in os.environ):
        say(f"note: {line}")


def shown(text: str) -> str:
    """Return a text for printing in one line, with escapes for what is not printable (control characters, broken names)."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode() for one in text)


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split())
