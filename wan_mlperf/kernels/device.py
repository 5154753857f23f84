"""The device that this rank computes on, probed once: gfx950, gfx942, sm100, sm90, another GPU, or the CPU, and why.

Only this module asks torch whether there is a GPU. How torch was built does not say: the ordinary wheel for Linux is a CUDA
build that also runs on machines without a GPU, and CUDA_VISIBLE_DEVICES="" hides existing ones.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from wan_mlperf import ranks

Fabric = Literal["links", "switch"]
T = TypeVar("T")

# Inductor's passes that start an exchange early and wait for it late. PyTorch recommends them, and AMD sets them.
_EARLY, _LATE = "reorder_communication_preserving_peak_memory", "sink_waits_iterative"
_OVERLAP = "reorder_for_compute_comm_overlap"
OVERLAP: dict[str, object] = {_OVERLAP: True, f"{_OVERLAP}_passes": [_EARLY, _LATE, _EARLY]}
# Variables that choose which of a host's GPUs a build of torch may see.
VISIBLE = {"CUDA": ("CUDA_VISIBLE_DEVICES",), "ROCm": ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")}


@dataclass(frozen=True, kw_only=True)
class Device:
    """`arch` is the key of the kernel tables. `name` and `why_cpu` (empty on a GPU) are for people."""

    arch: str
    name: str
    torch: torch.device
    why_cpu: str = ""

    @property
    def fabric(self) -> Fabric:
        """How a node's GPUs are connected: AMD's Instinct by a link per pair, NVIDIA's by a switch. CPU ranks share memory."""
        return "links" if self.arch.startswith("gfx9") else "switch"

    @property
    def is_gpu(self) -> bool:
        """True on CUDA and ROCm."""
        return self.torch.type == "cuda"

    def __str__(self) -> str:
        return f"{self.name}, on the CPU because {self.why_cpu}" if self.why_cpu else self.name


@functools.cache
def _look() -> tuple[int, str]:
    """Return how many GPUs this process may use, and what torch says about it."""
    with warnings.catch_warnings(record=True) as told:  # torch says it once per process: a driver that is too old, for instance
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return count, " ".join(str(told[0].message).split()).split(". ")[0] if told else ""


def gpu_count() -> int:
    """Return how many GPUs this process may use, 0 without one, whatever torch was built for."""
    return _look()[0]


_one_at_a_time = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """Put this around everything that computes: it sets what our arithmetic relies on, and lets in one thread at a time.

    Whatever else the program has set, fp32 and the CPU are the defaults inside, and autocast is off.
    """
    with _one_at_a_time, ExitStack() as stack:
        dtype, where = torch.get_default_dtype(), torch.get_default_device()
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if where.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def each_alone(items: Iterator[T]) -> Iterator[T]:
    """Yield the items; each is made inside `alone`. Between them the caller's settings hold."""
    while True:
        with alone():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


@functools.cache
def probe() -> Device:
    """Return this rank's device. torchrun's LOCAL_RANK chooses the GPU."""
    if not gpu_count():
        return Device(arch="cpu", name=_cpu_name(), torch=torch.device("cpu"), why_cpu=_why_cpu())
    index = ranks.local_rank() % gpu_count()
    properties = torch.cuda.get_device_properties(index)
    arch = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm{properties.major}{properties.minor}"
    return Device(arch=arch, name=properties.name, torch=torch.device("cuda", index))


def build() -> dict[str, str]:
    """Return what this torch was built for: {"CUDA": version}, {"ROCm": version}, or nothing for a CPU build."""
    builds = {"ROCm": torch.version.hip, "CUDA": torch.version.cuda}
    return {name: version for name, version in builds.items() if version}


def visible_by(name: str) -> dict[str, str]:
    """Return the variables that are set, of those that choose which GPUs a build of torch ("CUDA", "ROCm") may see."""
    return {variable: os.environ[variable] for variable in VISIBLE[name] if variable in os.environ}


def _why_cpu() -> str:
    """Say in a few words why torch sees no GPU."""
    version = f"torch {torch.__version__.split('+')[0]}"
    if not build():
        return f"{version} is a CPU build"
    ((name, number),) = build().items()
    hidden = [f"{variable}={value!r}" for variable, value in visible_by(name).items()]
    reason = f"says: {_look()[1]}" if _look()[1] else f"finds no GPU{' with ' if hidden else ''}{' and '.join(hidden)}"
    return f"{version}, built for {name} {number}, {reason}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else "CPU"
