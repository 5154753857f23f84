"""Files of measured runs: what a row must have, and which figures no run can have. What a row means: rows.py."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wan_mlperf.errors import BadInput

FILE = Path(__file__).with_name("measurements.json")
NEEDED = ("id", "hardware", "gpus", "attention", "gemm", "mesh", "steps", "size")
DECODE_NEEDED = ("id", "hardware", "ranks", "seconds", "source", "submitter")
WHOLE = {"gpus": 4096, "ranks": 4096, "decode_ranks": 4096, "steps": 1000}  # key -> the most it may be
FLAGS = ("fit", "cfg", "compile", "served", "decode_float32")
WORDS = ("id", "hardware", "gemm", "mesh", "size", "submitter", "framework", "source", "exception")


def load(file: Path, what: str) -> dict[str, Any]:
    """Return the tables of a measurements file, their types checked. Raises BadInput."""
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8-sig"))
        for table in ("end_to_end", "decode"):
            entries = values[table] if table == "end_to_end" else values.get(table, [])
            if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
                raise TypeError(f"{table} is not a list of rows")
        frameworks = values.get("frameworks", {})
        if not isinstance(frameworks, dict) or not all(isinstance(one, dict) for one in frameworks.values()):
            raise TypeError("frameworks is not a mapping of habits")
    except OSError as error:
        raise BadInput(f"{what}: cannot be read ({error.strerror}); allowed: a JSON file of rows") from None
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise BadInput(
            f"{what}: not a file of measurements ({type(error).__name__}: {error}); allowed: a JSON file "
            "with end_to_end, a list of rows as in wan_mlperf/predict/measurements.json"
        ) from None
    return values


def check(entry: Mapping[str, Any], what: str, needed: Sequence[str]) -> None:
    """Raise BadInput for a row that lacks a key, or has a figure that no run can have. Other keys are notes."""
    missing = [key for key in needed if key not in entry]
    if "gpus" in needed and not {"seconds", "published"} & entry.keys():
        missing.append("seconds")
    if missing:
        raise BadInput(f"{what}: lacks {', '.join(missing)}; a row must have them")
    for key, value in entry.items():
        allowed = ""
        if key in WHOLE and not (type(value) is int and 1 <= value <= WHOLE[key]):
            allowed = f"a whole number, 1 to {WHOLE[key]}"
        elif key == "seconds" and not (type(value) in (int, float) and 0 < value < math.inf):
            allowed = "a number above 0"
        elif key in FLAGS and not isinstance(value, bool):
            allowed = "true or false"
        elif key in WORDS and not isinstance(value, str):
            allowed = "text"
        elif key == "attention" and not (isinstance(value, str) or _are_shares(value)):
            allowed = "a kernel's name, or a mapping of names to shares above 0"
        elif key == "published" and not isinstance(value, dict):
            allowed = "a mapping that names a result of wan_mlperf/published/"
        if allowed:
            raise BadInput(f"{what}: {key}: {str(value)[:80]!r} is not allowed; allowed: {allowed}")


def _are_shares(value: object) -> bool:
    shares = value.values() if isinstance(value, dict) else ()
    return bool(shares) and all(type(share) in (int, float) and 0 < share < math.inf for share in shares)
