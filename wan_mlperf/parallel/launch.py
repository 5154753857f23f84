"""Starts the ranks of this host through torchrun's own library when the user has not started torchrun."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from wan_mlperf import files, process
from wan_mlperf.inputs import text


def launch(module: str, arguments: Sequence[str], world: int, *, stop_s: float = 30.0) -> int:
    """Start `python -m module arguments` on `world` ranks of this host through torchrun's own library; return the exit code.

    After a signal the ranks have `stop_s` seconds to end by themselves; the exit code is that of the first rank to end.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The ranks report what went wrong; torchrun's log would only repeat it, at length.
    for name in [one for one in logging.root.manager.loggerDict if one.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # each of its modules has set its own
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // world)))
    handled = [number.name for number in process.STOPS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup's stays ignored
    with files.scratch("job") as folder:
        file = folder / process.CODE
        # Whatever a rank or its libraries leave in the temporary folder is deleted with the job, even if the rank is killed.
        changed = {files.JOB: str(folder), "TMPDIR": str(folder), **text.hand_over(folder)}
        before = {name: os.environ.get(name) for name in changed}
        os.environ.update(changed)
        wanted: dict[str, Any] = {"signals_to_handle": ",".join(handled), "shutdown_timeout": math.ceil(stop_s)}
        # Not every supported version of torch has these.
        more = {name: value for name, value in wanted.items() if name in LaunchConfig.__dataclass_fields__}
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world,
            run_id="wan_mlperf",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.2,
            event_log_handler="null",
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
            **more,
        )
        try:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
        except ChildFailedError as error:
            if not file.exists():
                rank, failure = error.get_first_failure()
                process.say(f"failed: rank {rank} on {socket.gethostname()} ended with {_ending(failure.exitcode)}")
        except BaseException as error:
            number = getattr(error, "sigval", signal.SIGINT if isinstance(error, KeyboardInterrupt) else None)
            if number is None:
                raise
            if file.exists():  # a rank has reported its exit code
                return int(file.read_text())
            process.say(f"stopped by {signal.Signals(number).name}")
            return 128 + int(number)
        finally:
            process.leave_at_next_signal()  # torchrun's handlers would raise while the job's folder is deleted
            for name, value in before.items():
                os.environ.pop(name, None)
                os.environ.update({} if value is None else {name: value})
            files.clean_up_after(folder)
        return int(file.read_text()) if file.exists() else process.FAILED


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
