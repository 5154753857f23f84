"""systems/<system>.json: what a run measured of its machine (sut/machine.py), and what only a person knows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from wan_mlperf.errors import BadInput, did_you_mean

UNKNOWN = "to be filled in"  # only a dry run packs this
STATUS = ("available", "preview", "rdi")
SYSTEM_TYPES = ("datacenter", "edge", "datacenter,edge", "edge,datacenter")
# Fields that MLCommons' checker wants filled.
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


def template(measured: Mapping[str, object]) -> dict[str, str]:
    """Return a description to edit: measured fields are filled, all others are empty."""
    own = [field for field in (*REQUIRED, *OPTIONAL) if field not in ("division", "submitter")]
    return {field: str(measured.get(field, "")) for field in own}


def read(file: Path) -> dict[str, object]:
    """Read the description that a person filled in: any of the fields, but no others. Raises BadInput."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"system {str(file)!r}: cannot be read ({error}); allowed: what `submit system` writes, edited") from None
    if not isinstance(values, dict):
        raise BadInput(f"system {str(file)!r}: holds {type(values).__name__}; allowed: a JSON object")
    for field, value in values.items():
        if field not in (*REQUIRED, *OPTIONAL):
            raise BadInput(f"system {file.name}: no such field {field!r}{did_you_mean(field, (*REQUIRED, *OPTIONAL))}")
        if not isinstance(value, str | int | float):
            raise BadInput(f"system {file.name}: {field} is {value!r}; allowed: a text or a number")
    for field, allowed in (("status", STATUS), ("system_type", SYSTEM_TYPES)):
        if values.get(field) and values[field] not in allowed:
            raise BadInput(f"system {file.name}: {field} is {values[field]!r}; allowed: {', '.join(allowed)}")
    return values


def complete(person: Mapping[str, object], measured: Mapping[str, object], *, division: str, submitter: str) -> dict[str, object]:
    """Return every field that the checker reads: what a person wrote, or else the measured value, or else empty."""
    fixed = {"division": division, "submitter": submitter}
    for field, value in fixed.items():
        if person.get(field) and person[field] != value:
            raise BadInput(f"system: {field} is {person[field]!r}, but --{field} is {value!r}; allowed: the same")
    return {field: fixed.get(field) or person.get(field) or measured.get(field, "") for field in (*REQUIRED, *OPTIONAL)}


def unfilled(description: Mapping[str, object]) -> list[str]:
    """Return the fields that a person still has to fill in."""
    return [field for field in REQUIRED if not description[field]]
