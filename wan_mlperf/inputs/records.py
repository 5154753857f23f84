"""Dataclasses with a version, kept as JSON files: a run's result, a score's summary."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from wan_mlperf.errors import BadInput
from wan_mlperf.files import atomic_write

T = TypeVar("T")


def write_record(file: Path, record: Any, *, without: Collection[str] = ()) -> None:
    """Write a dataclass as JSON, without the fields named."""
    values = {key: value for key, value in dataclasses.asdict(record).items() if key not in without}
    atomic_write(file, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def read_record(file: Path, kind: type[T], *, version: int, what: str) -> T:
    """Read back a dataclass that has a `version`. The error message ends with `what` the record belongs to.

    Raises BadInput for a file that is missing, incomplete or of another version.
    """
    allowed = f"allowed: {what} of this version"
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "half a file, or not JSON"
        raise BadInput(f"{str(file)!r}: cannot be read ({reason}); {allowed}") from None
    if not isinstance(values, dict) or "version" not in values:
        raise BadInput(f"{str(file)!r}: has no version: an older one, or another kind of file; {allowed}")
    if values["version"] != version:
        raise BadInput(f"{str(file)!r}: is of version {values['version']!r}, and this program reads {version}; {allowed}")
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"{str(file)!r}: {key}: {first['msg']}; {allowed}") from None
