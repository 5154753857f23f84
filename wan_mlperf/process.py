"""How a process of ours ends: exit codes, and the one line of an error."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from wan_mlperf import ranks
from wan_mlperf.errors import BadInput, Failed

DONE, INVALID, BAD_INPUT, FAILED = 0, 1, 2, 3
EXIT_FILE = "WAN_MLPERF_EXIT_FILE"  # set by `launch`: where the first rank leaves its exit code


def entry(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run `main(arguments)` and exit with its code; a user's mistake is one line and code 2, a failure one line and code 3."""
    try:
        code = main(sys.argv[1:])
    except BadInput as error:
        if ranks.is_first():
            say(f"error: {one_line(error)}")
        code = BAD_INPUT
    except Failed as error:
        say(f"failed: {one_line(error)}")
        leave(FAILED)
    except KeyboardInterrupt:
        leave(128 + signal.SIGINT)
    except Exception:
        say(f"failed{f' on rank {ranks.rank()}' if ranks.under_torchrun() else ''}:")
        traceback.print_exc()
        leave(FAILED)
    finish(code)


def finish(code: int) -> NoReturn:
    """Exit after an orderly end. Under `launch` the first rank's code travels by file, so that torchrun reports no failure."""
    file = os.environ.get(EXIT_FILE)
    if file is None or not ranks.under_torchrun():
        sys.exit(code)
    if ranks.is_first():
        Path(file).write_text(str(code))
    sys.exit(0)


def leave(code: int) -> NoReturn:
    """Exit at once, whatever other threads or collectives are doing; torchrun then ends the other ranks."""
    file = os.environ.get(EXIT_FILE)
    if file is not None and ranks.under_torchrun():
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
