"""Files of measured runs: what a row must have, and which figures no run can have. What a row means: rows.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wan_mlperf.errors import BadInput
from wan_mlperf.inputs.text import read_json

FILE = Path(__file__).with_name("measurements.json")
NEEDED = ("id", "hardware", "gpus", "attention", "gemm", "mesh", "steps", "size")
DECODE_NEEDED = ("id", "hardware", "ranks", "seconds", "source", "submitter")
WHOLE = {"gpus": 4096, "ranks": 4096, "decode_ranks": 4096, "steps": 1000}  # key -> the most it may be
# Least and most of a figure: with those beyond, logarithms and sums overflow, and no run has them.
SECONDS = (1e-3, 1e6)
SHARE = (1e-6, 1e6)
FLAGS = ("fit", "cfg", "compile", "served", "decode_float32", "own_decoder")
WORDS = ("id", "hardware", "gemm", "mesh", "size", "submitter", "framework", "source", "exception")
LONGEST = 500  # characters of a text
ONLY = ("denoise",)


def load(file: Path, what: str) -> dict[str, Any]:
    """Return the tables of a measurements file and the habits of its frameworks, their types checked. Raises BadInput."""
    values = read_json(file, what="measurements", allowed="a JSON file of rows, as wan_mlperf/predict/measurements.json")
    wrong = ""
    if not isinstance(values, dict) or "end_to_end" not in values:
        wrong = "there is no end_to_end"
    else:
        for table in ("end_to_end", "decode"):
            entries = values.setdefault(table, [])
            if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
                wrong = f"{table} is not a list of rows"
        frameworks = values.setdefault("frameworks", {})
        if not isinstance(frameworks, dict) or not all(isinstance(one, dict) for one in frameworks.values()):
            wrong = "frameworks is not a mapping of habits"
    if wrong:
        raise BadInput(
            f"{what}: not a file of measurements ({wrong}); allowed: a JSON file with end_to_end, a list of rows as in "
            "wan_mlperf/predict/measurements.json"
        )
    for name, habits in values["frameworks"].items():
        check(habits, f"{what}: framework {name[:80]!r}", ())
    return values


def name_of(entry: Mapping[str, Any], number: int) -> str:
    """Return a row's id, or its number where it has no id that can be printed in one line."""
    name = entry.get("id")
    return name if isinstance(name, str) and _is_text(name) else f"row {number}"


def check(entry: Mapping[str, Any], what: str, needed: Sequence[str]) -> None:
    """Raise BadInput for a row that lacks a key, or has a figure that no run can have. Other keys are notes."""
    missing = [key for key in needed if key not in entry]
    if "gpus" in needed and not {"seconds", "published"} & entry.keys():
        missing.append("seconds")
    if missing:
        raise BadInput(f"{what}: lacks {', '.join(missing)}; a row must have them")
    for key, value in entry.items():
        if allowed := _refused(key, value):
            raise BadInput(f"{what}: {key}: {str(value)[:80]!r} is not allowed{allowed}")


def _refused(key: str, value: object) -> str:
    """Return what is allowed, if a row's value is not; else nothing."""
    allowed = ""
    if key in WHOLE and not (type(value) is int and 1 <= value <= WHOLE[key]):
        allowed = f"a whole number, 1 to {WHOLE[key]}"
    elif key == "seconds" and not _is_within(value, SECONDS):
        allowed = f"a number, {SECONDS[0]:g} to {SECONDS[1]:.0f}"
    elif key in FLAGS and not isinstance(value, bool):
        allowed = "true or false"
    elif key in WORDS and not (isinstance(value, str) and _is_text(value)):
        allowed = f"text, one line of at most {LONGEST} characters"
    elif key == "attention" and not (_is_text(value) if isinstance(value, str) else _are_shares(value)):
        allowed = f"a kernel's name, or a mapping of names to shares, {SHARE[0]:.6f} to {SHARE[1]:.0f}"
    elif key == "published" and not isinstance(value, dict):
        allowed = "a mapping that names a result of wan_mlperf/published/"
    elif key == "only" and value not in ONLY:
        allowed = ", ".join(ONLY)
    return f"; allowed: {allowed}" if allowed else ""


def _is_text(value: str) -> bool:
    return len(value) <= LONGEST and value.isprintable()


def _is_within(value: object, bounds: tuple[float, float]) -> bool:
    return type(value) in (int, float) and bounds[0] <= value <= bounds[1]  # type: ignore[operator]


def _are_shares(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(_is_within(share, SHARE) for share in value.values())
