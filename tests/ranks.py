"""Ranks for tests, forked from a process that has imported the engine: each is there in tenths of a second, not in six.

They are what torchrun starts in all but the start: processes with torchrun's variables, which meet at an agent's store. Tests of
the start itself, of commands and of faults start everything as a user does: `run_module`, tests/replicas/jobs.py.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["wan_mlperf.pipeline"])  # asks no GPU anything, so that a forked rank still may


def run_ranks(main: Callable[..., object], *arguments: object, ranks: int, timeout: float = 300) -> str:
    """Call `main(*arguments)`, a function of a module, on every rank, and return what rank 0 printed.

    Raises AssertionError with the output of a rank that failed, or that had not ended after `timeout` seconds.
    """
    from torch.distributed import TCPStore

    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        logs = [Path(folder, str(rank)) for rank in range(ranks)]
        variables = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        variables |= {"MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        jobs = []
        for rank, log in enumerate(logs):
            environment = {**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            jobs.append(_context.Process(target=_rank, args=(environment, log, main, arguments)))
        try:
            for job in jobs:
                job.start()
            _wait(jobs, timeout)
            for rank, job in enumerate(jobs):
                assert not job.exitcode, f"rank {rank} ended with {job.exitcode}:\n{_text(logs[rank])}"
            late = [rank for rank, job in enumerate(jobs) if job.exitcode is None]
            assert not late, f"rank {late[0]} had not ended after {timeout} s:\n{_text(logs[late[0]])}"
            return logs[0].read_text()
        finally:
            for job in jobs:
                if job.pid is not None:
                    job.kill()
                    job.join()


def _wait(jobs: Sequence[multiprocessing.process.BaseProcess], timeout: float) -> None:
    """Wait until all have ended, one has failed, or `timeout` seconds are over."""
    until = time.monotonic() + timeout
    while (running := [job.sentinel for job in jobs if job.exitcode is None]) and time.monotonic() < until:
        if any(job.exitcode for job in jobs):
            return
        connection.wait(running, timeout=until - time.monotonic())


def _rank(environment: dict[str, str], log: Path, main: Callable[..., object], arguments: Sequence[object]) -> None:
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ |= environment
    importlib.import_module("torch").set_num_threads(1)
    main(*arguments)
    sys.stdout.flush()


def _text(log: Path) -> str:
    return log.read_text()[-4000:] if log.exists() else ""
