"""What this rank computes on, probed once: gfx950, gfx942, sm100, sm90, another GPU, or the CPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from wan_mlperf import ranks


@dataclass(frozen=True, kw_only=True)
class Device:
    """`arch` is what kernel tables are keyed by; `name` is for people."""

    arch: str
    name: str
    torch: torch.device

    @property
    def is_gpu(self) -> bool:
        """True on CUDA and ROCm."""
        return self.torch.type == "cuda"


def gpu_count() -> int:
    """How many GPUs this host shows, 0 without one."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@functools.cache
def probe() -> Device:
    """Return this rank's device; torchrun's LOCAL_RANK picks the GPU."""
    if not gpu_count():
        return Device(arch="cpu", name=_cpu_name(), torch=torch.device("cpu"))
    index = ranks.local_rank() % gpu_count()
    properties = torch.cuda.get_device_properties(index)
    arch = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm{properties.major}{properties.minor}"
    return Device(arch=arch, name=properties.name, torch=torch.device("cuda", index))


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else "CPU"
