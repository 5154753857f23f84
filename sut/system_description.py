"""systems/<system>.json: what a run measured of its machine, and what only a person can say.

Apart from submission.py because the measuring happens in the run and the packing long after it, perhaps elsewhere.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_mlperf.errors import BadInput, near

UNKNOWN = "to be filled in"  # only a dry run packs this
STATUS = ("available", "preview", "rdi")
SYSTEM_TYPES = ("datacenter", "edge", "datacenter,edge", "edge,datacenter")
# Fields that MLCommons' checker wants with a meaning.
REQUIRED = (
    "division",
    "submitter",
    "status",
    "system_name",
    "system_type",
    "number_of_nodes",
    "host_processor_model_name",
    "host_processors_per_node",
    "host_processor_core_count",
    "host_memory_capacity",
    "host_memory_configuration",
    "host_storage_capacity",
    "host_storage_type",
    "host_networking",
    "host_network_card_count",
    "host_networking_topology",
    "accelerators_per_node",
    "accelerator_model_name",
    "accelerator_memory_capacity",
    "accelerator_host_interconnect",
    "accelerator_interconnect",
    "accelerator_memory_configuration",
    "cooling",
    "framework",
    "operating_system",
    "other_software_stack",
)
# Fields that must be there and may be empty.
OPTIONAL = (
    "host_processor_frequency",
    "host_processor_caches",
    "host_processor_interconnect",
    "accelerator_frequency",
    "accelerator_interconnect_topology",
    "accelerator_on-chip_memories",
    "hw_notes",
    "sw_notes",
    "system_type_detail",
)


def measure(outputs: Path) -> dict[str, str]:
    """Return the fields that this machine tells by itself; called where the benchmark runs. `outputs` lies on its storage."""
    processor = _cpuinfo()
    accelerator = _accelerators()
    return {
        "number_of_nodes": "1",
        **processor,
        "host_memory_capacity": _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "host_storage_capacity": _gib(shutil.disk_usage(outputs).total),
        **accelerator,
        "framework": _versions("torch", "xfuser", "diffusers"),
        "operating_system": f"{_os_name()}, Linux {platform.release()}",
        "other_software_stack": ", ".join([f"Python {platform.python_version()}", *_stack()]),
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


def _accelerators() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        names = ("accelerator_model_name", "accelerator_memory_capacity", "accelerator_host_interconnect")
        more = ("accelerator_interconnect", "accelerator_memory_configuration")
        return {"accelerators_per_node": "0", **dict.fromkeys((*names, *more), "none")}
    first = torch.cuda.get_device_properties(0)
    return {
        "accelerators_per_node": str(torch.cuda.device_count()),
        "accelerator_model_name": first.name,
        "accelerator_memory_capacity": _gib(first.total_memory),
    }


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _stack() -> list[str]:
    import torch

    builds = {"ROCm": torch.version.hip, "CUDA": torch.version.cuda}
    parts = [f"{name} {version}" for name, version in builds.items() if version]
    return [*parts, _versions("mlcommons-loadgen", "torchao", "transformers")]


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


def template(measured: Mapping[str, Any]) -> dict[str, str]:
    """Return a description to edit: measured fields filled, all others empty."""
    own = [field for field in (*REQUIRED, *OPTIONAL) if field not in ("division", "submitter")]
    return {field: str(measured.get(field, "")) for field in own}


def read(file: Path) -> dict[str, Any]:
    """Read a person's description: any of the fields, and no others. Raises BadInput."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"system {str(file)!r}: cannot be read ({error}); allowed: what `submit system` writes, edited") from None
    if not isinstance(values, dict):
        raise BadInput(f"system {str(file)!r}: holds {type(values).__name__}; allowed: a JSON object")
    for field, value in values.items():
        if field not in (*REQUIRED, *OPTIONAL):
            raise BadInput(f"system {file.name}: no such field {field!r}{near(field, (*REQUIRED, *OPTIONAL))}")
        if not isinstance(value, str | int | float):
            raise BadInput(f"system {file.name}: {field} is {value!r}; allowed: a text or a number")
    for field, allowed in (("status", STATUS), ("system_type", SYSTEM_TYPES)):
        if values.get(field) and values[field] not in allowed:
            raise BadInput(f"system {file.name}: {field} is {values[field]!r}; allowed: {', '.join(allowed)}")
    return values


def complete(person: Mapping[str, Any], measured: Mapping[str, Any], *, division: str, submitter: str) -> dict[str, Any]:
    """Return every field that the checker reads: a person's word first, then the measured value, else empty."""
    fixed = {"division": division, "submitter": submitter}
    for field, value in fixed.items():
        if person.get(field) and person[field] != value:
            raise BadInput(f"system: {field} is {person[field]!r}, but --{field} is {value!r}; allowed: the same")
    return {field: fixed.get(field) or person.get(field) or measured.get(field, "") for field in (*REQUIRED, *OPTIONAL)}


def unfilled(description: Mapping[str, Any]) -> list[str]:
    """Return the fields that a person still has to fill."""
    return [field for field in REQUIRED if not description[field]]
