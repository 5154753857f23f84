"""The text of a value -> a value of its key's type.

A scalar in YAML or on the command line does not say its type: `no` is a word, a boolean and a country. The key's declared type
decides, so nobody has to know YAML's rules. What fits no declared type is returned as what it looks like, and later refused with
its key.
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import math
import re
import types
import typing
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
BASED = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
REAL = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
NOTHING = ("", "~", "null")
MAPPINGS = (dict, collections.abc.Mapping)
LISTS = (list, collections.abc.Sequence)


def alternatives(annotation: Any) -> list[Any]:
    """Return the types that a declaration allows: unions taken apart, Annotated removed, Literals as they are."""
    origin = get_origin(annotation)
    if origin is typing.Annotated:
        return alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [one for part in get_args(annotation) for one in alternatives(part)]
    return [type(None) if annotation is None else annotation]


def scalar(text: str, annotation: Any = None) -> Any:
    """Return the value of an unquoted `text` for a key declared as `annotation`; if it fits no type, what it looks like."""
    kinds = alternatives(annotation) if annotation is not None else []
    literals = [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
    if text.lower() in NOTHING:
        return None
    if text in literals:
        return text
    if bool in kinds and text.lower() in (*TRUE, *FALSE):
        return text.lower() in TRUE
    number = _number(text)
    if isinstance(number, int) and (int in kinds or any(number == value for value in literals)):
        return number
    if float in kinds and number is not None and math.isfinite(number):
        return float(number)
    return text if str in kinds else _looks_like(text)


def _number(text: str) -> int | float | None:
    try:
        if WHOLE.fullmatch(text) or BASED.fullmatch(text):
            return int(text, 0)
        return float(text) if REAL.fullmatch(text) and not re.fullmatch(r"[-+]?0\d+", text) else None
    except ValueError:  # more digits than Python converts
        return None


def _looks_like(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    number = _number(text)
    return text if number is None else number


def field_type(annotation: Any, key: str) -> Any:
    """Return how `key` is declared in a dataclass, or the values of a mapping; None if it is not declared."""
    for kind in alternatives(annotation) if annotation is not None else []:
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            return get_type_hints(kind, include_extras=True).get(key)
        if get_origin(kind) in MAPPINGS:
            return get_args(kind)[1]
    return None


def item_type(annotation: Any, index: int) -> Any:
    """Return how a list's items are declared; None if they are not."""
    for kind in alternatives(annotation) if annotation is not None else []:
        parts = get_args(kind)
        if get_origin(kind) is tuple and parts[1:] != (Ellipsis,):
            return parts[index] if index < len(parts) else None
        if get_origin(kind) in (tuple, *LISTS):
            return parts[0]
    return None


def is_nested(annotation: Any) -> bool:
    """True for a key whose value may be a list, a mapping or a dataclass."""
    kinds = alternatives(annotation) if annotation is not None else []
    return any(dataclasses.is_dataclass(kind) or get_origin(kind) in (tuple, *LISTS, *MAPPINGS) for kind in kinds)


def from_command_line(text: str, annotation: Any) -> Any:
    """Return the value of `text` from a command line. Raises ValueError for lists and mappings that are not YAML.

    A key for text gets it unchanged, except that `null` means None where that is allowed.
    """
    kinds = alternatives(annotation) if annotation is not None else []
    if str in kinds and not is_nested(annotation):
        return None if text == "null" and type(None) in kinds else text
    if is_nested(annotation):
        from wan_mlperf.inputs import strict_yaml  # which reads its scalars with the functions above

        return strict_yaml.load(text, annotation)
    return scalar(text.strip(), annotation)


def whole_number(text: str) -> int:
    """Type of a flag that is a whole number. Unlike int() it refuses `4_2`, ` 42 ` and digits of other scripts."""
    if not (WHOLE.fullmatch(text) and len(text) < 400):
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}; allowed: a whole number")
    return int(text)


def number(text: str) -> float:
    """Type of a flag that is a number. Unlike float() it refuses `nan`, `inf`, `1_0` and digits of other scripts."""
    if not (REAL.fullmatch(text) and math.isfinite(float(text))):
        raise argparse.ArgumentTypeError(f"invalid float value: {text!r}; allowed: a finite number")
    return float(text)
