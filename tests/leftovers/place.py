"""A machine of a command's own, as far as files go: home, temporary and working folder, and what is new in /dev/shm."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.conftest import ROOT
from tests.replicas.jobs import Job, begin
from wan_mlperf.files import TEMPORARY

HOOKS = ROOT / "tests" / "leftovers" / "hooks"
SHARED_MEMORY = Path("/dev/shm")
# What our libraries name there. Of other names nobody can tell whose they are: other processes of the machine have some, too.
OUR_SHARED = ("torch_", "psm_", "nccl", "gloo", "wan_mlperf")
SHARED_S = 15.0  # what a process of somebody else may take from its last use to the removal
CACHE = "home/.cache/wan_mlperf"


class Place:
    """Fresh folders inside `root`; commands started here find nothing else of this user's."""

    def __init__(self, root: Path) -> None:
        self.root, self.home, self.temporary, self.working = root, root / "home", root / "tmp", root / "cwd"
        for folder in (self.home, self.temporary, self.working):
            folder.mkdir()
        self._shared = self._shared_names()

    def start(self, words: Sequence[str], **variables: str) -> Job:
        """Start a module with its arguments. Everything that it starts carries a token, by which `Job` finds it."""
        token = f"job-{uuid.uuid4().hex}"
        dropped = ("WAN_MLPERF_CACHE", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")
        env = {name: value for name, value in os.environ.items() if name not in dropped}
        env |= {"HOME": str(self.home), "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        env |= {"PYTHONPATH": f"{HOOKS}:{ROOT}", "WAN_MLPERF_TEST_JOB": token, "PYTHONDONTWRITEBYTECODE": "1", **variables}
        return begin([sys.executable, "-m", *words], env, token, working=self.working)

    def files(self) -> set[str]:
        """All files, links and empty folders, relative to the root."""
        found = set()
        for folder, folders, names in os.walk(self.root):
            inside = Path(folder).relative_to(self.root)
            found |= {str(inside / name) for name in names}
            found |= {str(inside / name) for name in folders if os.path.islink(os.path.join(folder, name))}
            if not folders and not names:
                found.add(f"{inside}/")
        return found

    def left(self, *outputs: str) -> list[str]:
        """What is there now besides the cache and what matches one of the patterns `outputs`, and new shared memory."""
        allowed = [re.compile(pattern) for pattern in (*outputs, rf"{re.escape(CACHE)}/.*", "(home|tmp|cwd)/")]
        left = [
            name
            for name in sorted(self.files())
            if f"/{TEMPORARY}" in f"/{name}" or not any(pattern.fullmatch(name) for pattern in allowed)
        ]
        return left + [f"{SHARED_MEMORY}/{name}" for name in self._shared_left()]

    def _shared_left(self) -> list[str]:
        """New shared memory that nobody uses. Other processes of this machine come and go, so it must stay for a while."""
        until = time.monotonic() + SHARED_S
        while (left := [name for name in sorted(self._shared_names() - self._shared) if not _is_used(name)]) != []:
            if time.monotonic() > until:
                break
            time.sleep(0.5)
        return left

    @staticmethod
    def _shared_names() -> set[str]:
        found = os.listdir(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else []
        return {name for name in found if name.startswith(OUR_SHARED)}


def _is_used(name: str) -> bool:
    """True if a living process has this shared memory: somebody else's, as ours have ended."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if f"{SHARED_MEMORY}/{name}" in maps.read_text():
                return True
        except OSError:
            continue
    return False


def await_moment(job: Job, moment: Callable[[], bool], timeout: float = 240.0) -> None:
    """Wait until something is so. Fails if the job ends before."""
    until = time.monotonic() + timeout
    while not moment():
        assert job.process.poll() is None, f"ended too early:\n{job.output}"
        assert time.monotonic() < until, f"the moment never came:\n{job.output}"
        time.sleep(0.02)


def ranks_of(job: Job) -> dict[int, int]:
    """Rank -> process, of a job's ranks that are alive."""
    found = {}
    for process in job.survivors():
        try:
            variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = next((one.partition(b"=")[2] for one in variables if one.startswith(b"RANK=")), b"")
        if rank:
            found[int(rank)] = process
    return found


def end(job: Job, way: str) -> None:
    """End a job as a user, a system or a terminal does: Ctrl-C and SIGHUP reach all its processes, SIGTERM the first one.

    "timeout" is coreutils' command: SIGTERM for the first process, and at once another for all. "impatient" is Ctrl-C twice.
    """
    if way.startswith("kill"):
        os.kill(ranks_of(job)[int(way[-1])], signal.SIGKILL)
    elif way == "launcher":
        job.process.kill()
    elif way == "SIGTERM":
        job.process.terminate()
    elif way == "timeout":
        job.process.terminate()
        os.killpg(job.process.pid, signal.SIGTERM)
    elif way == "impatient":
        os.killpg(job.process.pid, signal.SIGINT)
        time.sleep(0.3)
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGINT)
    else:
        os.killpg(job.process.pid, signal.Signals[way])
