"""What we tune: one frozen, nested recipe per run, read from one complete YAML by one strict loader.

A key that is not here, a value of the wrong type or a contradiction is refused with the key, the value and what is allowed,
before any weight is read. The benchmark's own values are not here: see workload.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from wan_mlperf.errors import BadInput, did_you_mean
from wan_mlperf.workload import MLPERF, Workload

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FILLED = {"folder", "exact"}  # fields that only the loader sets
STRICT = ConfigDict(extra="forbid", strict=True)

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1, le=4096)]
Dtype = Literal["checkpoint", "bfloat16", "float32"]
AttentionName = Literal["sdpa", "sage_fp8", "sage_fp4"]
GemmName = Literal["bf16", "fp8", "mxfp4"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Model:
    """Which weights, and the dtype they compute in (`checkpoint`: the one they are stored in)."""

    checkpoint: str = "embedded"
    dtype: Dtype = "bfloat16"
    vae_dtype: Dtype = "float32"
    fixed_latent: str | None = None  # MLCommons' fixed_latent.pt; without it the noise is drawn from the seed


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Mesh:
    """How the ranks are used: world = replicas x cfg x ulysses x ring.

    `ranks` is how many ranks `python -m wan_mlperf.run` starts (auto: one per GPU, two without one); under torchrun, torchrun
    decides. cfg auto is 2 for an even number of ranks; ulysses auto takes what is left.
    """

    ranks: Count | Auto = "auto"
    replicas: Count | Auto = 1
    cfg: Literal[1, 2] | Auto = "auto"
    ulysses: Count | Auto = "auto"
    ring: Count = 1
    span_hosts: bool = False  # may one replica use ranks of several hosts?

    @model_validator(mode="after")
    def _one_unknown(self) -> Mesh:
        if self.replicas == "auto" and self.ulysses == "auto":
            raise ValueError("replicas and ulysses cannot both be auto; allowed: give one of them a number")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Attention:
    """Kernel of self-attention per step: `early` for the first `early_fraction` of the steps, then `late`; or `steps`, a list."""

    early: AttentionName = "sdpa"
    late: AttentionName = "sdpa"
    early_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.85
    steps: tuple[AttentionName, ...] | None = None
    cross: Literal["sdpa"] = "sdpa"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Gemm:
    """Format of each expert's linear layers; `keep` maps name patterns to another format, the first match wins."""

    high_noise: GemmName = "bf16"
    low_noise: GemmName = "bf16"
    keep: tuple[tuple[str, Literal["bf16", "fp8"]], ...] = ()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Vae:
    """`chunk`: latent frames per decoder call after the first; more is faster and takes more memory."""

    chunk: Count = 1


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Compile:
    """torch.compile, per part."""

    experts: bool = False
    decoder: bool = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Offline:
    """`batch`: how many samples a replica makes at once, where enough are left; for devices that one sample leaves idle."""

    batch: Annotated[int, Field(ge=1, le=64)] = 1


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Faults:
    """When a rank is given up, in seconds: silent for `dead_s`; no progress for `hang_s` within a sample, `start_s` before it.

    Progress is a denoising step or a chunk of the decoder: `hang_s` must be longer than either takes.
    """

    dead_s: Annotated[float, Field(ge=1.0, le=86400.0)] = 30.0
    hang_s: Annotated[float, Field(ge=1.0, le=86400.0)] = 60.0
    start_s: Annotated[float, Field(ge=1.0, le=86400.0)] = 1800.0

    @model_validator(mode="after")
    def _in_order(self) -> Faults:
        if self.hang_s < self.dead_s:
            raise ValueError(
                "hang_s is below dead_s; allowed: at least dead_s, so that a dead rank is named before those it keeps waiting"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """One complete run: see the files in configs/ for one per use."""

    name: str
    model: Model = Model()
    workload: Workload | None = None  # only for another model than the benchmark's: see workload.py
    mesh: Mesh = Mesh()
    attention: Attention = Attention()
    gemm: Gemm = Gemm()
    references: Literal["allow", "forbid"] = "forbid"  # may a PyTorch reference stand in for a kernel this device lacks?
    trim_text: bool = False  # the equal padding tokens of the text as one token with the log of their number as bias
    vae: Vae = Vae()
    compile: Compile = Compile()
    offline: Offline = Offline()
    faults: Faults = Faults()
    warmup_queries: Annotated[int, Field(ge=0, le=100)] = 1
    user_conf: str = "mlperf/user.conf"  # LoadGen's settings, relative to the recipe's folder
    folder: str = ""  # filled by the loader: where the recipe lies
    exact: bool = False  # filled by make_exact

    @property
    def effective_workload(self) -> Workload:
        """The workload of this run: the benchmark's unless the recipe names its own."""
        return self.workload or MLPERF

    @property
    def user_conf_path(self) -> Path:
        """Where LoadGen's user.conf lies."""
        return Path(self.folder) / self.user_conf


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


def make_exact(recipe: Recipe) -> Recipe:
    """Return the recipe with every approximation off, computing in the checkpoint's own dtype.

    What only changes the order of roundings (`trim_text`, `vae.chunk`) stays on several ranks, where a sum is cut differently
    anyway; on one rank the pipeline turns it off, too, and is equal to diffusers' bit for bit.
    """
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, dtype="checkpoint", vae_dtype="checkpoint"),
        attention=Attention(),
        gemm=Gemm(),
        compile=Compile(),
        exact=True,
    )


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
