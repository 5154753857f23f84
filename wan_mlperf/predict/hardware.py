"""GPUs by name, from one data file (hardware.json): dense peaks, memory, power, fabric, each figure with its source."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from wan_mlperf.errors import BadInput, did_you_mean

FILE = Path(__file__).with_name("hardware.json")
Fabric = Literal["mesh", "switch", "pcie"]
Format = Literal["bf16", "fp8", "fp4"]
# Words of a device name that say nothing about its figures.
_SAYS_NOTHING = re.compile(
    r"nvidia|amd|instinct|geforce|tesla|gpu|accelerator|tensor|core|blackwell|hopper|ampere|sxm\d?|oam|hgx|ac|x?8|"
    r"hbm\d?e?|vf|\d+gi?b|gi?b|workstation|server|edition"
)
SAME_MEMORY = 0.08  # a B300 is sold as 288 GB and shows 270


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One GPU. Peaks are dense, in TFLOP/s, None for formats that it cannot multiply; memory in the vendor's GB, power in W.

    `fabric`: "mesh", one link per pair of GPUs and `link_gb_s` each way on each; "switch", all of `link_gb_s` to any GPU;
    "pcie", through the host. `sources` names each figure's source.
    """

    name: str
    arch: str
    bf16: float
    fp8: float | None
    fp4: float | None
    memory_gb: float
    bandwidth_tb_s: float
    power_w: float
    fabric: Fabric
    link_gb_s: float
    sources: dict[str, str] = field(hash=False)

    def peak(self, kind: str) -> float:
        """Dense peak in FLOP/s. Raises BadInput for a format that this GPU cannot multiply."""
        value = {"bf16": self.bf16, "fp8": self.fp8, "fp4": self.fp4}[kind]
        if value is None:
            have = ", ".join(one for one in ("bf16", "fp8", "fp4") if getattr(self, one) is not None)
            raise BadInput(f"hardware {self.name}: has no {kind} products; allowed there: {have}")
        return value * 1e12

    @property
    def bandwidth(self) -> float:
        """Memory bandwidth in bytes/s."""
        return self.bandwidth_tb_s * 1e12

    @property
    def memory(self) -> float:
        """Memory in bytes. Vendors' GB of GPU memory are 2^30 bytes: an H100 of 80 GB shows 81,559 MiB."""
        return self.memory_gb * 2**30


@cache
def all_hardware() -> tuple[Hardware, ...]:
    """Every GPU of the data file."""
    rows: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["hardware"]
    return tuple(Hardware(**row) for row in rows)


def find(name: str) -> Hardware:
    """Return a GPU by its name, as people or its driver write it (mi355x, "RTX 5090", NVIDIA B200-SXM-180GB). Raises BadInput."""
    found = of_device(str(name))
    if found is None:
        names = [one.name for one in all_hardware()]
        near = did_you_mean(str(name).upper(), names)
        raise BadInput(f"hardware {str(name)[:80]!r}: is not known{near}; allowed: {', '.join(names)}")
    return found


def of_device(device_name: str) -> Hardware | None:
    """Return the GPU that a driver's device name means ("AMD Instinct MI355X", "NVIDIA H100 80GB HBM3"), else None.

    A variant with other figures is not that GPU: H100 PCIe, H200 NVL, RTX 4090 Laptop, A100 of 40 GB.
    """
    if (known := _by_name().get(_plain(device_name))) is not None:
        return known
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    sizes = [float(size) for size in re.findall(r"(\d+) ?gi?b\b", device_name.lower())]
    for gpu in sorted(all_hardware(), key=lambda one: -len(one.name)):
        rest = _without(words, gpu.name.lower().split())
        if rest is not None and all(_SAYS_NOTHING.fullmatch(word) for word in rest):
            fits = all(abs(size / gpu.memory_gb - 1) < SAME_MEMORY for size in sizes)
            return gpu if fits else None
    return None


def _without(words: Sequence[str], name: Sequence[str]) -> list[str] | None:
    """Return the words around `name`, which may be written as one word ("RTX5090"); None if it is not there."""
    for length in (len(name), 1):
        for start in range(len(words) - length + 1):
            if "".join(words[start : start + length]) == "".join(name):
                return [*words[:start], *words[start + length :]]
    return None


@cache
def _by_name() -> dict[str, Hardware]:
    return {_plain(one.name): one for one in all_hardware()}


@cache
def _plain(name: str) -> str:
    text = "".join(letter for letter in str(name).lower() if letter.isalnum())
    for maker in ("nvidia", "amdinstinct", "amd", "geforce"):
        text = text.removeprefix(maker)
    return text.removesuffix("sxm5").removesuffix("sxm")
