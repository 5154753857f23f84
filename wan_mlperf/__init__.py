"""Wan2.2 text-to-video under MLPerf LoadGen."""

from __future__ import annotations

import os
import sys


def _leave_out_working_folder() -> None:
    """Keep the working folder off the module path: with `python -m`, a user's random.py there would be imported first.

    This also holds for the processes that this one starts, and not where this package itself is in that folder. A file
    wan_mlperf.py, or one named like what Python imports before this line (types.py), needs `python -P -m wan_mlperf.run`.
    """
    home = os.path.realpath(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if sys.argv[:1] != ["-m"] or sys.flags.safe_path or not sys.path or os.path.realpath(sys.path[0] or ".") == home:
        return
    try:
        here = os.getcwd()
    except OSError:  # it was removed
        return
    if os.path.realpath(sys.path[0] or ".") == os.path.realpath(here):
        del sys.path[0]
        os.environ["PYTHONSAFEPATH"] = "1"


_leave_out_working_folder()

import importlib.util  # noqa: E402 (not before the path is clean)
import logging  # noqa: E402
import platform  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402


def _why_not_here(*, command: bool) -> str | None:
    """Say in one line what this system lacks, or return None. For a command, also check that the packages are installed."""
    needed = "Linux with glibc on x86-64 or ARM64, and Python 3.11 or newer"
    here = f"{platform.system()} on {platform.machine()}, Python {platform.python_version()}"
    reason = ""
    if sys.platform != "linux":
        reason = "triton, which xDiT imports, has no wheel for it; a container or a virtual machine with Linux has everything"
    elif platform.libc_ver()[0] != "glibc":
        reason = "torch and triton have no wheels for another C library"
    elif platform.machine() not in ("x86_64", "aarch64"):
        reason = "torch, triton and LoadGen have no wheels for this processor"
    elif sys.version_info < (3, 11):  # noqa: UP036 (a clone is run without pip's check)
        reason = "several pinned packages have no release for this Python; make run PYTHON=python3.12"
    if reason:
        return f"this is {here}; needed: {needed} ({reason})"
    if command and importlib.util.find_spec("rich") is None:
        return f"nothing is installed for {sys.executable}; allowed: .venv/bin/python after `make run`, or `make install` first"
    return None


if (_problem := _why_not_here(command=sys.argv[:1] == ["-m"])) is not None:
    if sys.argv[:1] not in (["-m"], ["-c"]):
        raise ImportError(_problem)
    sys.stderr.write(f"error: {_problem}\n")  # for `python -m wan_mlperf.run`, and for the Makefile: no traceback
    raise SystemExit(2)

# transformers, diffusers and torchao warn once per rank about optional parts that are not used here; the user's own setting wins.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
# When a rank ends, the C++ part of torch.distributed warns on the others with 30 stack frames. The watch says it in one line.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# A new large tensor's memory comes from the system page by page. In pages of 4 KiB that takes a CPU several times as long as the
# operation that fills it. torch reads this at its first tensor, and asks for pages of 2 MiB (for tensors from 2 MiB on).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
for _name in ("torchao", "torch.utils._pytree", "yunchang"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def _set_up_miopen() -> None:
    """Where ROCm is installed, choose MIOpen's convolution settings before torch loads it; the user's own settings win.

    By default MIOpen takes a naive kernel for this VAE: 17 s instead of 47 ms for one convolution (ROCm/rocm-libraries 1329).
    AMD's own submissions use the same settings: no direct convolutions, one search per shape, its result kept in a database.
    """
    if not Path(os.environ.get("ROCM_PATH", "/opt/rocm")).is_dir():
        return
    from wan_mlperf.files import cache_folder

    os.environ.setdefault("MIOPEN_DEBUG_CONV_DIRECT", "0")
    os.environ.setdefault("MIOPEN_FIND_MODE", "3")
    os.environ.setdefault("MIOPEN_FIND_ENFORCE", "3")
    os.environ.setdefault("MIOPEN_USER_DB_PATH", str(cache_folder() / "miopen"))  # persists, unlike a container's home
    os.environ.setdefault("PYTORCH_MIOPEN_SUGGEST_NHWC", "1")


_set_up_miopen()
if sys.argv[:1] == ["-m"]:  # one of our commands, before torch is imported; another program decides for itself
    from wan_mlperf.files import keep_compiled

    keep_compiled(os.environ)

__all__ = ["Pipeline", "Workload", "load_recipe"]


def __getattr__(name: str) -> Any:
    # Imported when asked for, so that an entry point without a model (doctor) starts without torch.
    if name == "Pipeline":
        from wan_mlperf.pipeline import Pipeline

        return Pipeline
    if name == "load_recipe":
        from wan_mlperf.recipe import load_recipe

        return load_recipe
    if name == "Workload":
        from wan_mlperf.workload import Workload

        return Workload
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
