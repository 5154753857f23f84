"""Reads a recipe from YAML, strictly, and writes it back.

An unknown key, a value of the wrong type or a contradiction is refused before any weight is read, with the key, the value and
what is allowed.
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
from wan_mlperf.inputs import paths, strict_yaml, text, values
from wan_mlperf.recipe.parts import FILLED, Recipe, make_exact
from wan_mlperf.workload import MLPERF, Workload

_INSTALLED = Path(__file__).resolve().parent.parent / "configs"  # of a wheel; a checkout has them at its top
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parent.parent / "configs"


def load_recipe(path: str | Path, *, overrides: Sequence[str] = (), model: str | None = None, exact: bool = False) -> Recipe:
    """Read a recipe from a YAML file, or from configs/ by its name.

    `overrides` are "key.path=value" strings; `model` is the name or folder of a checkpoint, taken literally. `exact` turns every
    approximation off: no quantisation, no low-precision attention, no compilation, and each part in the dtype in which diffusers
    loads it by itself. Raises BadInput.
    """
    if isinstance(overrides, str) or not all(isinstance(one, str) for one in overrides):
        raise BadInput(f"overrides: {overrides!r} is not allowed; allowed: a list of texts, such as ['mesh.ranks=1']")
    file = _find(path)
    content = text.read_text(file, what="recipe", allowed="a readable YAML file")
    try:
        found = strict_yaml.load(content, Recipe)
    except strict_yaml.NotStrict as error:
        raise BadInput(f"recipe {str(file)!r}: {error}; allowed: a mapping of recipe keys, each once") from None
    if not isinstance(found, dict):
        kind = "nothing" if found is None else type(found).__name__
        raise BadInput(f"recipe {str(file)!r}: holds {kind}; allowed: a mapping of recipe keys")
    for override in overrides:
        _set(found, override)
    if model is not None:
        _set(found, f"model.checkpoint={model}")
    for filled in FILLED & found.keys():
        raise BadInput(f"recipe {str(file)!r}: {filled}: is not a key of a recipe")
    found.setdefault("name", paths.utf8(file.stem, what="recipe"))
    # A recipe from a pipe has no folder, so its user.conf is looked for in configs/.
    found["folder"] = paths.utf8(str(CONFIGS if text.may_be_stream(file) else file.parent.resolve()), what="recipe's folder")
    recipe = parse(found, source=f"recipe {str(file)!r}")
    return make_exact(recipe) if exact else recipe


def parse(values: dict[str, object], *, source: str) -> Recipe:
    """Build a Recipe from plain values. The error line begins with `source`. Raises BadInput."""
    return _parse(Recipe, values, source)


def replace_workload(workload: Workload, **changes: object) -> Workload:
    """Return the workload with `changes`, checked. Raises BadInput."""
    return _parse(Workload, {**dataclasses.asdict(workload), **changes}, "workload")


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML with every default, which `load_recipe` reads back."""
    values = TypeAdapter(Recipe).dump_python(recipe, mode="json", exclude=FILLED)
    heading = "# with --exact\n" if recipe.exact else ""
    return heading + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _parse(kind: type[object], values: dict[str, object], source: str) -> Any:
    try:
        # As JSON, because a strict check of JSON takes a mapping for a nested part and a list for a tuple, and nothing else.
        return TypeAdapter(kind).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise BadInput(f"{source}: {_explain(kind, error)}") from None
    except (RecursionError, TypeError, ValueError) as error:
        raise BadInput(f"{source}: {_one_line(error)}; allowed: plain keys and values") from None


def _find(path: str | Path) -> Path:
    """Return a recipe's file. A bare name means one in configs/, whatever is in the working folder."""
    named = CONFIGS / f"{path}.yaml"
    names = sorted(one.stem for one in CONFIGS.glob("*.yaml"))
    if str(path) in names:
        return named
    file = paths.expand(str(path), what="recipe")
    if text.may_be_stream(file) and not file.is_dir():
        return file
    if paths.is_file(file, what="recipe"):
        return file
    kind = "is a folder" if paths.is_folder(file, what="recipe") else "no such file"
    raise BadInput(
        f"recipe {str(path)!r}: {kind}{did_you_mean(file.stem, names)}; allowed: a YAML file or one of {', '.join(names)}"
    )


def _set(recipe: dict[str, object], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise BadInput(f"--set {override!r}: allowed: key.path=value, such as attention.early_fraction=0.8")
    paths.utf8(override, what="--set")
    kind: object = Recipe
    place = recipe
    for number, part in enumerate(parts):
        kind = values.field_type(kind, part)
        if number == len(parts) - 1:
            break
        inner = place.get(part)
        if inner is None:  # a recipe without a workload has the benchmark's, of which one value changes
            inner = place[part] = dataclasses.asdict(MLPERF) if part == "workload" else {}
        if not isinstance(inner, dict):
            raise BadInput(f"--set {override!r}: {part} is {inner!r}, which has no keys")
        place = inner
    try:
        place[parts[-1]] = values.from_command_line(value, kind)
    except ValueError as error:
        raise BadInput(f"--set {override!r}: {value!r} is not a value of {key} ({error})") from None


def _explain(kind: type[object], error: ValidationError) -> str:
    """Return one line for the first thing that is wrong: key, value, what is allowed."""
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
    key = ".".join(part if part.isprintable() and len(part) <= 80 else _short(part) for part in path) or "the whole"
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


def _dataclass_of(annotation: object) -> Any:
    """Return the nested dataclass in a field's type, if there is one."""
    return next((one for one in (annotation, *get_args(annotation)) if dataclasses.is_dataclass(one)), None)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
