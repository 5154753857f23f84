"""A file system that fails at the n-th call. `python -m tests.brought.broken_disk` runs commands on it, each in a fork.

Python's own calls are counted and failed: those of `os`, and open, read and write of `open`. A library that calls the system from
C or Rust is not seen: for those that read what a user named, the call into the library fails (`ENTRANCES`).
"""

from __future__ import annotations

import builtins
import importlib
import io
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Calls that name a path, or a descriptor of one.
CALLS = (
    *(
        "open",
        "stat",
        "lstat",
        "mkdir",
        "rmdir",
        "unlink",
        "remove",
        "rename",
        "replace",
        "link",
        "symlink",
        "listdir",
        "scandir",
    ),
    *("readlink", "chmod", "utime", "statvfs", "truncate", "ftruncate", "fsync", "fstat", "write", "read", "lseek"),
)
ENTRANCES = ("safetensors.safe_open", "safetensors.torch.load_file", "av.open", "torch.load")
MODES = {"r": os.O_RDONLY, "w": os.O_WRONLY}
PATIENCE_S = 120.0


class Disk:
    """Everything inside `root`. Call number `fail_at`, and with `for_good` each one after it, fails with `error`."""

    def __init__(self, root: str, log: str, fail_at: int, error: int, for_good: bool) -> None:
        self._root, self._fail_at, self._error, self._for_good = root, fail_at, error, for_good
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._count = itertools.count(1)
        self._real = {name: getattr(os, name) for name in CALLS}
        self._process = os.getpid()

    def touch(self, call: str, path: Any, name: Any = None) -> None:
        """Count a call, and fail it if it is its turn."""
        place = self._place(path)
        if not place.startswith(self._root) or os.getpid() != self._process:
            return
        number = next(self._count)
        failed = number >= self._fail_at if self._for_good else number == self._fail_at
        self._real["write"](self._log, f"{'!' if failed else ' '}{call} {place}\n".encode(errors="replace"))
        if failed:
            raise OSError(self._error, os.strerror(self._error), name)

    def _place(self, path: Any) -> str:
        if isinstance(path, int):
            try:
                return os.fsdecode(self._real["readlink"](f"/proc/self/fd/{path}"))
            except OSError:
                return ""
        found = os.fsdecode(path)
        return self._place(int(found.rpartition("/")[2])) if found.startswith("/proc/self/fd/") else os.path.abspath(found)

    def install(self) -> None:
        """Replace the calls of this process."""
        for name, real in self._real.items():
            setattr(os, name, self._watched(name, real))
        io.open = builtins.open = self._open
        for entrance in ENTRANCES:
            module, _, name = entrance.rpartition(".")
            real = getattr(importlib.import_module(module), name)
            watched = self._watched(entrance, real)
            for one in list(sys.modules.values()):
                if getattr(one, "__dict__", {}).get(name) is real:
                    setattr(one, name, watched)

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *more: Any, **keys: Any) -> Any:
            where: Any = path
            if isinstance(where, int | str | bytes | os.PathLike):
                folder = next((keys[key] for key in ("dir_fd", "src_dir_fd", "dst_dir_fd") if keys.get(key) is not None), None)
                place = where if folder is None else os.path.join(self._place(folder), os.fsdecode(path))
                self.touch(name, place, None if isinstance(path, int) else path)
            return real(path, *more, **keys)

        call.__name__ = name
        return call

    def _open(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if opener is None:
            self.touch("open", file, None if isinstance(file, int) else file)
        disk = self

        class File(io.FileIO):
            def write(self, content: Any) -> int:
                disk.touch("write", self.fileno())
                return super().write(content)

            def readinto(self, buffer: Any) -> int:
                disk.touch("read", self.fileno())
                return super().readinto(buffer)

            def readall(self) -> bytes:
                disk.touch("read", self.fileno())
                return super().readall()

        raw = File(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        if "+" in mode:
            kind: Any = io.BufferedRandom
        else:
            kind = io.BufferedReader if "r" in mode else io.BufferedWriter
        stream = kind(raw) if buffering in (-1, 1) else kind(raw, buffering)
        return stream if "b" in mode else io.TextIOWrapper(stream, encoding, errors, newline, buffering == 1)


def child(job: dict[str, Any]) -> None:
    """Run one command to its end on a broken disk. Never returns."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.setsid()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    from wan_mlperf import process

    sys.argv[:] = ["command", *job["arguments"]]
    main = importlib.import_module(job["module"]).main
    Disk(job["root"], job["log"], job["fail_at"], job["error"], job["for_good"]).install()
    try:
        process.entry(main)
    except SystemExit as end:
        process.leave(int(end.code or 0))
    except BaseException:
        traceback.print_exc()
        os._exit(99)


def main() -> None:
    """For each line of the standard input, a job in JSON, write a line with its exit code."""
    for module in ("wan_mlperf.pipeline", "sut.session", "wan_mlperf.replicas.dispatch", "diffusers", *sys.argv[1:]):
        importlib.import_module(module)
    print("ready", flush=True)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            try:
                child(json.loads(line))
            finally:
                os._exit(98)
        until = time.monotonic() + PATIENCE_S
        status = 0
        while True:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                break
            if time.monotonic() > until:
                os.killpg(process, signal.SIGKILL)
            time.sleep(0.005)
        print(os.waitstatus_to_exitcode(status), flush=True)


class Runner:
    """That process, as the tests use it."""

    def __init__(self, folder: Path, *modules: str) -> None:
        import subprocess

        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.brought.broken_disk", *modules]
        self._folder = folder
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"

    def run(self, module: str, *arguments: str, fail_at: int = 0, error: int = 0, for_good: bool = False, env: Any = None) -> Any:
        """Run a command whose n-th call fails, or with 0 none. Returns exit code, output, errors, and the calls."""
        files = {name: str(self._folder / f"{name}.txt") for name in ("out", "err", "log")}
        for file in files.values():
            Path(file).write_text("")
        root = self._folder / "place"
        job = {
            "module": module,
            "arguments": arguments,
            "root": str(root),
            "cwd": str(root),
            "fail_at": fail_at or 10**9,
            "error": error,
            "for_good": for_good,
            "env": env or {},
            **files,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        out, err, log = (Path(file).read_text(errors="replace") for file in files.values())
        return code, out, err, log.splitlines()

    def close(self) -> None:
        """End it."""
        self._process.communicate()


if __name__ == "__main__":
    main()
