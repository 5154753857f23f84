"""What a run measures of its machine, for systems/<system>.json. Packing happens later, perhaps on another machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from collections import Counter
from pathlib import Path

from wan_mlperf import ranks
from wan_mlperf.doctor import ecc
from wan_mlperf.doctor import host_checks as host


def measure(outputs: Path, *, world: int = 1) -> dict[str, str]:
    """Return the fields that can be read from this machine. Called where the benchmark runs, with `world` ranks.

    `outputs` is on the storage that counts. Nodes and accelerators are those that took part, not all that exist. "ecc",
    "network" and "pcie" are not fields of a system description; packing reads them.
    """
    processor = _cpuinfo()
    per_node = ranks.local_world_size(world)
    accelerator = _accelerators(per_node)
    return {
        "number_of_nodes": str(max(1, world // max(1, per_node))),
        **processor,
        "host_memory_capacity": _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "host_storage_capacity": _gib(shutil.disk_usage(outputs).total),
        **accelerator,
        "framework": _versions("torch", "xfuser", "diffusers"),
        "operating_system": f"{_os_name()}, Linux {platform.release()}",
        "other_software_stack": ", ".join([f"Python {platform.python_version()}", *_stack()]),
        "ecc": ": ".join(ecc.state()),
        "network": _networks(),
        "pcie": _pcie(),
    }


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""

    def values(key: str) -> list[str]:
        return re.findall(rf"^{key}\s*: (.+)$", text, re.M)

    found = {"host_processors_per_node": str(len(set(values("physical id"))) or 1)}
    for field, key in (("host_processor_model_name", "model name"), ("host_processor_core_count", "cpu cores")):
        if values(key):
            found[field] = values(key)[0].strip()
    return found


def _accelerators(per_node: int) -> dict[str, str]:
    import torch

    from wan_mlperf.kernels.device import gpu_count

    if not gpu_count():
        names = ("accelerator_model_name", "accelerator_memory_capacity", "accelerator_host_interconnect")
        more = ("accelerator_interconnect", "accelerator_memory_configuration")
        return {"accelerators_per_node": "0", **dict.fromkeys((*names, *more), "none")}
    first = torch.cuda.get_device_properties(0)
    return {
        "accelerators_per_node": str(min(per_node, gpu_count())),
        "accelerator_model_name": first.name,
        "accelerator_memory_capacity": _gib(first.total_memory),
    }


def _networks(root: Path = Path("/")) -> str:
    """Return every hardware network interface whose speed is known, such as "eth0 100000 Mb/s"."""
    found = []
    for folder in sorted((root / "sys/class/net").glob("*")):
        speed = host.read(folder / "speed") or ""
        if speed.isdigit() and (folder / "device").exists():
            found.append(f"{folder.name} {speed} Mb/s")
    return ", ".join(found)


def _pcie(root: Path = Path("/")) -> str:
    """The accelerators' links to the host as the kernel trained them, such as "8 x 32.0 GT/s PCIe x16"."""
    links = []
    for folder in (root / "sys/bus/pci/devices").glob("*"):
        ids = host.PCI_IDS.get(host.read(folder / "vendor") or "", ())
        if ids and (host.read(folder / "device") or "").startswith(ids):
            speed, width = host.read(folder / "current_link_speed"), host.read(folder / "current_link_width")
            if speed and width:
                links.append(f"{speed} x{width}")
    return ", ".join(f"{count} x {link}" for link, count in sorted(Counter(links).items()))


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _stack() -> list[str]:
    from wan_mlperf.kernels.device import build

    return [
        *(f"{name} {version}" for name, version in build().items()),
        _versions("mlcommons-loadgen", "torchao", "transformers"),
    ]


def _versions(*names: str) -> str:
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _gib(size: int) -> str:
    return f"{size / 2**30:.0f} GiB"
