"""Starts a job as a user does, with a fault in one of its ranks, and looks at what is left of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from wan_mlperf.video import read_mp4

HOOKS = ROOT / "tests" / "replicas" / "hooks"
RECIPE = """
name: test
model: {{checkpoint: {model}, dtype: float32}}
workload: {{height: 32, width: 32, frames: 5, fps: 8, steps: 2}}
mesh: {{ranks: 2, replicas: {replicas}, cfg: 1, ulysses: auto}}
references: allow
vae: {{chunk: 4}}
faults: {{dead_s: 3, hang_s: 8, start_s: 300}}
user_conf: user.conf
"""
USER_CONF = """
*.Offline.min_query_count = {queries}
*.Offline.min_duration = 0
*.Offline.target_qps = 1
*.SingleStream.min_query_count = {queries}
*.SingleStream.min_duration = 0
"""


def write_recipe(folder: Path, model: Path, *, replicas: int = 2, queries: int = 12) -> Path:
    """Write a recipe of two ranks, and its user.conf, into `folder`."""
    (folder / "user.conf").write_text(USER_CONF.format(queries=queries))
    file = folder / "test.yaml"
    file.write_text(RECIPE.format(model=model, replicas=replicas))
    return file


def torchrun(*, ranks: int = 2, more: Sequence[str] = ("--standalone",)) -> list[str]:
    """The command that starts ranks without our launcher."""
    return [sys.executable, "-m", "torch.distributed.run", *more, f"--nproc-per-node={ranks}", "-m"]


@dataclass
class Job:
    """A running job; everything it starts carries its token in the environment."""

    process: subprocess.Popen[str]
    token: str
    lines: list[tuple[float, str]] = field(default_factory=list)
    reader: threading.Thread | None = None

    def read(self) -> None:
        """Thread: keep every line with the time it came."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip()))

    @property
    def output(self) -> str:
        """All that was printed so far."""
        return "\n".join(line for _, line in self.lines)

    def await_line(self, pattern: str, timeout: float = 240.0) -> float:
        """Wait for a line that matches; return when it came."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            for when, line in list(self.lines):
                if re.search(pattern, line):
                    return when
            assert self.process.poll() is None or self.reader is None or self.reader.is_alive(), self.output
            time.sleep(0.02)
        raise AssertionError(f"no line {pattern!r} in:\n{self.output}")

    def finish(self, timeout: float = 240.0) -> tuple[int, float]:
        """Wait for the end; return exit code and the time of it. Fails if a process of the job is left."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the job did not end:\n{self.output}") from None
        ended = time.monotonic()
        assert self.reader is not None
        self.reader.join(10)
        until = time.monotonic() + 5
        while (left := self.survivors()) and time.monotonic() < until:
            time.sleep(0.1)
        self.kill()
        assert not left, f"processes left behind: {left}\n{self.output}"
        return code, ended

    def failures(self) -> list[str]:
        """The lines that say why it failed."""
        return [line for _, line in self.lines if line.startswith(("failed", "INVALID", "error", "stopped"))]

    def survivors(self) -> list[int]:
        """Processes of this job that are alive."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.token.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    def kill(self) -> None:
        """End what is left of this job, and nothing else."""
        for process in self.survivors():
            os.kill(process, signal.SIGKILL)


def start(
    module: str, arguments: Sequence[str], *, fault: str = "", halves: bool = False, command: Sequence[str] | None = None
) -> Job:
    """Start an entry point, with the `fault` and `halves` of hooks/sitecustomize.py, by our launcher or by `command`."""
    token = f"job-{uuid.uuid4().hex}"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WAN_MLPERF_TEST_JOB": token, "PYTHONWARNINGS": "ignore"}
    if fault or halves:
        env |= {"PYTHONPATH": str(HOOKS), "WAN_MLPERF_TEST_FAULT": fault, "WAN_MLPERF_TEST_HALVES": "1" if halves else ""}
    return begin([*(command or [sys.executable, "-m"]), module, *arguments], env, token)


def begin(words: Sequence[str], env: Mapping[str, str], token: str, *, working: Path = ROOT) -> Job:
    """Start a command whose environment has the token, and read what it prints."""
    process = subprocess.Popen(
        words,
        cwd=working,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that a test can send Ctrl-C to the job and not to pytest
    )
    job = Job(process, token)
    job.reader = threading.Thread(target=job.read, daemon=True)
    job.reader.start()
    return job


def offline(recipe: Path, outputs: Path, *more: str) -> list[str]:
    """Arguments of an Offline run with its own small prompts."""
    prompts = outputs.parent / "prompts.txt"
    prompts.write_text("".join(f"a shape number {number}\n" for number in range(12)))
    return ["--scenario", "offline", "--recipe", str(recipe), "--prompts", str(prompts), "--outputs", str(outputs), *more]


def result(outputs: Path) -> dict[str, Any]:
    """The result of the newest run."""
    return json.loads((outputs / "latest" / "result.json").read_text())


def partial_files(folder: Path) -> list[Path]:
    """Files that are not whole: empty ones, videos that cannot be read, JSON that does not parse."""
    wrong = []
    for file in (one for one in folder.rglob("*") if one.is_file() and not one.name.startswith((".", "mlperf_log"))):
        try:
            if file.suffix == ".mp4":
                assert len(read_mp4(file))
            elif file.suffix == ".json":
                json.loads(file.read_text())
            else:
                assert file.stat().st_size
        except (OSError, ValueError, AssertionError):
            wrong.append(file)
    return wrong
