"""What the tests share: a checkpoint with random weights, and a way to start entry points as a user does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one of two test processes on two cores; read when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell that starts the tests in the background has them ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
# A video of 5 frames of 32 x 32 in 2 steps: seconds become tenths.
SMALL = (
    "--set=workload.steps=2",
    "--set=workload.height=32",
    "--set=workload.width=32",
    "--set=workload.frames=5",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out the tests by file, and those of the server by their folder, so that one server is started for all of them."""
    from xdist.scheduler import LoadFileScheduling

    class ByServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/serve" if nodeid.startswith("tests/serve/") else str(super()._split_scope(nodeid))

    config.option.loadscopereorder = False  # by default, files of few tests come last, and those are the long ones
    return ByServer(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What uses a fixture that starts processes is a job."""
    for item in items:
        if {"served", "made", "done"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.job)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Diffusers folder with random weights: the embedded model's heads and layout, but fewer layers."""
    from wan_mlperf.bench import random_checkpoint

    return random_checkpoint.write(tmp_path_factory.mktemp("model"), layers=2, ffn=256)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests never touch the user's cache folder."""
    os.environ["WAN_MLPERF_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", autouse=True)
def _no_group_left() -> Iterator[None]:
    """A pipeline of one test file leaves no process group to the next one."""
    yield
    if "torch.distributed" in sys.modules:
        from wan_mlperf.parallel import xdit_groups

        xdit_groups.stop_groups()


def run_module(
    arguments: Sequence[str], *, ranks: int | None = None, timeout: float = 300, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m <arguments>`, with `ranks` under torchrun with that many. Does not raise on a non-zero exit code."""
    command = [sys.executable, "-m", *arguments]
    if ranks is not None:
        command[1:2] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    full = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(command, cwd=ROOT, env=full, capture_output=True, text=True, timeout=timeout, check=False)
