"""A recipe from YAML, and back: one strict loader.

A key that is not known, a value of the wrong type or a contradiction is refused with the key, the value and what is allowed,
before any weight is read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from wan_mlperf.errors import BadInput, did_you_mean
from wan_mlperf.recipe.parts import FILLED, Recipe, make_exact
from wan_mlperf.workload import Workload

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"


def load_recipe(path: str | Path, *, overrides: Sequence[str] = (), exact: bool = False) -> Recipe:
    """Read a recipe from a YAML file, or by the name of one in configs/.

    `overrides` are "key.path=value" strings. `exact` turns every approximation off: no quantisation, no low-precision
    attention, no compilation, and the checkpoint's own dtype. Raises BadInput.
    """
    file = _find(path)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"recipe {file}: cannot be read ({error.strerror}); allowed: a readable YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise BadInput(f"recipe {file}: not YAML ({_one_line(error)}); allowed: a mapping of recipe keys") from None
    if not isinstance(values, dict):
        raise BadInput(f"recipe {file}: holds {type(values).__name__}; allowed: a mapping of recipe keys")
    for override in overrides:
        _set(values, override)
    for filled in FILLED & values.keys():
        raise BadInput(f"recipe {file}: {filled}: is not a key of a recipe")
    values.setdefault("name", file.stem)
    values["folder"] = str(file.parent.resolve())
    recipe = parse(values, source=f"recipe {file}")
    return make_exact(recipe) if exact else recipe


def parse(values: dict[str, Any], *, source: str) -> Recipe:
    """Build a Recipe from plain values; `source` begins the error line. Raises BadInput."""
    return _parse(Recipe, values, source)


def replace_workload(workload: Workload, **changes: Any) -> Workload:
    """Return the workload with `changes`, checked. Raises BadInput."""
    return _parse(Workload, {**dataclasses.asdict(workload), **changes}, "workload")


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, every default written out; `load_recipe` reads it back."""
    values = TypeAdapter(Recipe).dump_python(recipe, mode="json", exclude=FILLED)
    heading = "# with --exact\n" if recipe.exact else ""
    return heading + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _parse(kind: type[Any], values: dict[str, Any], source: str) -> Any:
    try:
        # As JSON, because a strict check of JSON takes a mapping for a nested part and a list for a tuple, and nothing else.
        return TypeAdapter(kind).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise BadInput(f"{source}: {_explain(kind, error)}") from None
    except (RecursionError, TypeError, ValueError) as error:
        raise BadInput(f"{source}: {_one_line(error)}; allowed: plain keys and values") from None


def _find(path: str | Path) -> Path:
    file = Path(path)
    if file.is_file():
        return file
    named = CONFIGS / f"{path}.yaml"
    if file.suffix == "" and file.name == str(path) and named.is_file():
        return named
    names = sorted(one.stem for one in CONFIGS.glob("*.yaml"))
    raise BadInput(
        f"recipe {str(path)!r}: no such file{did_you_mean(file.stem, names)}; allowed: a YAML file or one of {', '.join(names)}"
    )


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise BadInput(f"--set {override!r}: allowed: key.path=value, such as attention.early_fraction=0.8")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise BadInput(f"--set {override!r}: {text!r} is not a YAML value") from None
    for part in parts[:-1]:
        inner = values.setdefault(part, {})
        if inner is None:
            inner = values[part] = {}
        if not isinstance(inner, dict):
            raise BadInput(f"--set {override!r}: {part} is {inner!r}, which has no keys")
        values = inner
    values[parts[-1]] = value


def _explain(kind: type[Any], error: ValidationError) -> str:
    """One line for the first thing that is wrong: key, value, what is allowed."""
    first = error.errors()[0]
    # Pydantic adds the branch of a union it tried to the location: only real keys are shown.
    location = [str(part) for part in first["loc"]]
    fields, path = kind, []
    for part in location:
        known = {one.name: one for one in dataclasses.fields(fields)} if dataclasses.is_dataclass(fields) else {}
        if dataclasses.is_dataclass(fields) and part not in known:
            path.append(part)
            break
        if not known and not part.isdigit():
            continue
        path.append(part)
        fields = _dataclass_of(get_type_hints(fields)[part]) if part in known else None  # type: ignore[assignment]
    key = ".".join(path) or "the whole"
    if first["type"] == "unexpected_keyword_argument" or first["type"] == "extra_forbidden":
        names = [one.name for one in dataclasses.fields(fields)] if dataclasses.is_dataclass(fields) else []
        names = [name for name in names if name not in FILLED]
        return f"{key}: no such key{did_you_mean(location[-1], names)}; allowed: {', '.join(names)}"
    if first["type"].startswith("missing"):
        return f"{key}: is missing; a {kind.__name__.lower()} must have it"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    problems = [one["msg"].removeprefix("Input should be ") for one in error.errors() if one["loc"][:1] == first["loc"][:1]]
    if first["type"] != "value_error":
        message = "allowed: " + " or ".join(dict.fromkeys(problems))
    return f"{key}: {_short(first['input'])} is not allowed; {message}"


def _dataclass_of(annotation: Any) -> Any:
    """The nested dataclass of a field's type, if there is one."""
    return next((one for one in (annotation, *get_args(annotation)) if dataclasses.is_dataclass(one)), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
