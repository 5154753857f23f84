"""Starts the ranks of this host through torchrun's own library, for users who have not started torchrun themselves."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from wan_mlperf import process


def launch(module: str, arguments: Sequence[str], world: int) -> int:
    """Start `python -m module arguments` on `world` ranks of this host through torchrun's own library; return the exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The ranks say themselves what went wrong; the agent's log would only repeat it, at length.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // world)))
    with tempfile.TemporaryDirectory(prefix="wan_mlperf-") as folder:
        file = Path(folder) / "code"
        os.environ[process.EXIT_FILE] = str(file)
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
            if not file.exists():  # else rank 0 has said it
                process.say(f"stopped by {signal.Signals(number).name}")
            return 128 + int(number)
        finally:
            del os.environ[process.EXIT_FILE]
        return int(file.read_text()) if file.exists() else process.FAILED


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
