"""GPUs by name, from one data file (hardware.json): dense peaks, memory, power, fabric, each figure with its source."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from wan_mlperf.errors import BadInput, did_you_mean

FILE = Path(__file__).with_name("hardware.json")
Fabric = Literal["mesh", "switch", "pcie"]
Format = Literal["bf16", "fp8", "fp4"]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One GPU. Peaks are dense, in TFLOP/s, None where it has no such products; memory in the vendor's GB, board power in W.

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
        """Dense peak in FLOP/s. Raises BadInput for a format that this GPU has no products of."""
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
    """Return a GPU by its name, however it is written (mi355x, "RTX 5090", rtx-5090, NVIDIA H100). Raises BadInput."""
    wanted, by_name = _plain(name), _by_name()
    if wanted not in by_name:
        names = [one.name for one in all_hardware()]
        near = did_you_mean(str(name).upper(), names)
        raise BadInput(f"hardware {name!r}: is not known{near}; allowed: {', '.join(names)}")
    return by_name[wanted]


@cache
def _by_name() -> dict[str, Hardware]:
    return {_plain(one.name): one for one in all_hardware()}


def of_device(device_name: str) -> Hardware | None:
    """Return the GPU that a driver's device name speaks of ("AMD Instinct MI355X", "NVIDIA H100 80GB HBM3"), else None."""
    text = _plain(device_name)
    found = [one for one in all_hardware() if _plain(one.name) in text]
    return max(found, key=lambda one: len(one.name)) if found else None


@cache
def _plain(name: str) -> str:
    text = "".join(letter for letter in str(name).lower() if letter.isalnum())
    for maker in ("nvidia", "amdinstinct", "amd", "geforce"):
        text = text.removeprefix(maker)
    return text.removesuffix("sxm5").removesuffix("sxm")
