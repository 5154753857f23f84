"""Reads the fields of a request, and checks them like a command line: before any work, naming the field that is wrong.

MLCommons' endpoints client and OpenAI's use different fields, and write a video's size in different orders: see `SIZE_ORDER`.
"""

from __future__ import annotations

import re
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from wan_mlperf.errors import BadInput, did_you_mean
from wan_mlperf.preflight import Setup, change, read_fixed_latent
from wan_mlperf.recipe import replace_workload
from wan_mlperf.serve.errors import Refused
from wan_mlperf.step_plan import Step
from wan_mlperf.text_encoder import check_prompt
from wan_mlperf.workload import MLPERF, Workload

Dialect = Literal["endpoints", "openai"]
# `fixed`: a request must agree with the recipe's workload. `any`: it may change it. `recipe`: what it says about it is ignored.
Policy = Literal["fixed", "any", "recipe"]
# MLCommons' client sends "720x1280" for 720 rows of 1,280 pixels; OpenAI's writes width x height.
SIZE_ORDER: dict[Dialect, tuple[str, str]] = {"endpoints": ("height", "width"), "openai": ("width", "height")}
WORKLOAD_FIELDS = {
    "num_frames": "frames",
    "fps": "fps",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance_high",
    "guidance_scale_2": "guidance_low",
    "boundary_ratio": "boundary_ratio",
}
SECONDS_APART = 0.5  # how far a length in seconds may be from that of the frames and still mean the same

# Python reads more than these as numbers: "1_0", "1.0" for an integer, digits of other scripts.
INTEGER, DECIMAL = re.compile(r"[+-]?[0-9]+"), re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def _integer(value: object) -> object:
    if isinstance(value, str) and not INTEGER.fullmatch(value):
        raise PydanticCustomError("integer", "Input should be an integer in decimal digits")
    return value


def _decimal(value: object) -> object:
    if isinstance(value, str) and not DECIMAL.fullmatch(value):
        raise PydanticCustomError("decimal", "Input should be a decimal number")
    return value


Integer = Annotated[int, BeforeValidator(_integer)]
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_decimal)]


class Fields(BaseModel):
    """The fields of both dialects. A field that is null counts as absent."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    negative_prompt: str | None = None
    model: Annotated[str, Field(max_length=200)] | None = None  # ignored: there is only one
    size: Annotated[str, Field(max_length=20)] | None = None
    seconds: Annotated[Number, Field(gt=0, le=3600)] | None = None
    seed: Integer | None = None
    num_frames: Integer | None = None
    fps: Integer | None = None
    num_inference_steps: Integer | None = None
    guidance_scale: Number | None = None
    guidance_scale_2: Number | None = None
    boundary_ratio: Number | None = None


class EndpointsFields(Fields):
    """`POST /v1/videos/generations` and `/v1/videos/sync`."""

    latent_path: str | None = None
    output_format: Literal["auto", "mp4"] | None = None
    response_format: Literal["video_path", "video_bytes"] | None = None


class OpenAIFields(Fields):
    """`POST /v1/videos`. `preview` is the page's: stream the frames while they are decoded."""

    preview: bool | None = None


KINDS: dict[Dialect, TypeAdapter[Any]] = {"endpoints": TypeAdapter(EndpointsFields), "openai": TypeAdapter(OpenAIFields)}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A requested video. `seed`, `negative_prompt` and `latent` are None for the recipe's; `changes` are to its workload."""

    prompt: str
    seed: int | None
    negative_prompt: str | None
    latent: str | None
    workload: Workload
    plan: tuple[Step, ...]
    changes: dict[str, Any] | None
    preview: bool = False


class Reader:
    """Reads requests for one loaded setup. It has its own tokenizer: the engine uses the other one in another thread."""

    def __init__(self, setup: Setup, *, policy: Policy, latents: Path | None) -> None:
        self._setup, self._policy, self._latents = setup, policy, latents
        self._tokenizer = setup.checkpoint.load_tokenizer()
        self._one_at_a_time = threading.Lock()

    def read(self, values: dict[str, Any], dialect: Dialect, *, text: bool = False) -> tuple[Wanted, Any]:
        """Return the requested video and all fields. `text`: every value is text, because it came in a form. Raises Refused."""
        fields = _fields(values, dialect, text=text)
        base = self._setup.workload
        setup = self._setup if self._policy == "recipe" else self._fitting(self._workload(fields, dialect))
        workload = setup.workload
        self._check_text(fields)
        changes = {key: value for key, value in asdict(workload).items() if value != getattr(base, key)}
        wanted = Wanted(
            prompt=fields.prompt,
            seed=self._seed(fields, workload),
            negative_prompt=fields.negative_prompt,
            latent=self._latent(fields, workload),
            workload=workload,
            plan=setup.plan,
            changes=changes or None,
            preview=bool(getattr(fields, "preview", None)),
        )
        return wanted, fields

    def _workload(self, fields: Fields, dialect: Dialect) -> Workload:
        """Return the workload that the fields describe. Under the policy `fixed` it must be the recipe's."""
        base = workload = self._setup.workload
        wanted: list[tuple[str, str, object]] = []
        if fields.size is not None:
            sides = re.fullmatch(r"(\d{1,4})x(\d{1,4})", fields.size, re.ASCII)
            order = SIZE_ORDER[dialect]
            if sides is None:
                allowed = f"{' x '.join(order)}, such as {_size(base, order)}"
                raise Refused(f"size: {fields.size!r} is not allowed; allowed: {allowed}", param="size")
            wanted += [("size", key, int(side)) for key, side in zip(order, sides.groups(), strict=True)]
        wanted += [(name, key, getattr(fields, name)) for name, key in WORKLOAD_FIELDS.items()]
        for name, key, value in wanted:
            if value is None:
                continue
            if self._policy == "fixed" and value != getattr(base, key):
                allowed = _size(base, SIZE_ORDER[dialect]) if name == "size" else f"{getattr(base, key)}"
                given = _short(fields.size if name == "size" else value)
                raise Refused(f"{name}: {given} is not this server's workload; allowed: {allowed}", param=name)
            workload = _changed(workload, name, key, value)
        if fields.seconds is not None and fields.num_frames is None:
            workload = self._length(workload, fields.seconds)
        return workload

    def _seed(self, fields: Fields, workload: Workload) -> int | None:
        """Return the seed of the noise; None for the recipe's own noise, from its fixed latent or its workload's seed."""
        base = self._setup.workload
        seed = base.seed if fields.seed is None else _changed(base, "seed", "seed", fields.seed).seed
        return None if seed == base.seed and base.latent_shape(0) == workload.latent_shape(0) else seed

    def _length(self, workload: Workload, seconds: float) -> Workload:
        """Return the workload with the number of frames for `seconds`. Raises Refused."""
        if min(abs(seconds - (workload.frames - one) / workload.fps) for one in (0, 1)) <= SECONDS_APART:
            return workload
        if self._policy == "fixed":
            allowed = f"{workload.frames / workload.fps:.4g}"
            raise Refused(f"seconds: {seconds:g} is not this server's workload; allowed: {allowed}", param="seconds")
        frames = 4 * round(seconds * workload.fps / 4) + 1
        try:
            return replace_workload(workload, frames=frames)
        except BadInput as error:
            _, _, reason = str(error).partition("allowed; allowed: ")
            made = f"{frames} frames at {workload.fps} per second"
            message = f"seconds: {seconds:g} is not allowed ({made}); allowed: frames {reason}"
            raise Refused(message, param="seconds") from None

    def _fitting(self, workload: Workload) -> Setup:
        """Return the setup with this workload. Raises Refused if the loaded engine cannot make it."""
        if workload == self._setup.workload:
            return self._setup
        most = max(MLPERF.values, self._setup.workload.values)
        if workload.values > most:
            raise Refused(f"size: {workload.values:,} pixels over all frames; allowed: at most {most:,}", param="size")
        try:
            return change(self._setup, workload)
        except BadInput as error:
            param = "num_inference_steps" if str(error).startswith("steps") else "size"
            raise Refused(str(error), param=param) from None

    def _check_text(self, fields: Fields) -> None:
        for name, text in (("prompt", fields.prompt), ("negative_prompt", fields.negative_prompt)):
            if text is None:
                continue
            try:
                with self._one_at_a_time:
                    check_prompt(self._tokenizer, text, what=name, may_be_empty=name == "negative_prompt")
            except BadInput as error:
                raise Refused(str(error), param=name) from None

    def _latent(self, fields: Fields, workload: Workload) -> str | None:
        """Return the file of the initial noise, which must be in the folder that --latents names."""
        named = getattr(fields, "latent_path", None)
        if named is None:
            return None
        if self._latents is None:
            raise Refused(
                "latent_path: this server has no folder of latents (--latents); allowed: leave it out", param="latent_path"
            )
        shape = workload.latent_shape(self._setup.checkpoint.config("transformer")["in_channels"])
        try:
            file = (self._latents / named).resolve(strict=True)
            if file.is_relative_to(self._latents) and file.is_file():
                read_fixed_latent(str(file), shape)
                return str(file)
        except (OSError, ValueError, RuntimeError):  # BadInput is a ValueError, and so is a NUL in the name
            pass
        allowed = f"a tensor of shape {(1, *shape)} in the folder that the server's --latents names"
        raise Refused(f"latent_path: cannot be used; allowed: {allowed}", param="latent_path")


def _fields(values: dict[str, Any], dialect: Dialect, *, text: bool) -> Any:
    kind = KINDS[dialect]
    given = {name: value for name, value in values.items() if value is not None}
    known = [*(EndpointsFields if dialect == "endpoints" else OpenAIFields).model_fields]
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        shown = unknown[:80] if unknown and unknown.isprintable() else ascii(unknown[:80])  # "" or a lone surrogate
        message = f"{shown}: no such field{did_you_mean(shown, known)}; allowed: {', '.join(known)}"
        raise Refused(message, param=shown)
    seconds = given.get("seconds")
    if dialect == "openai" and isinstance(seconds, str) and DECIMAL.fullmatch(seconds):  # OpenAI's client: text in JSON, too
        given["seconds"] = float(seconds)
    try:
        return kind.validate_python(given, strict=not text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0])[:80] if first["loc"] else "body"
        if first["type"] == "missing":
            message = f"{name}: is missing; allowed: text"
        else:
            message = f"{name}: {_short(given.get(name))} is not allowed; {first['msg'].replace('Input should be', 'allowed:')}"
        raise Refused(message, param=name) from None


def _changed(workload: Workload, name: str, key: str, value: object) -> Workload:
    try:
        return replace_workload(workload, **{key: value})
    except BadInput as error:
        _, _, reason = str(error).partition("allowed; ")
        raise Refused(f"{name}: {_short(value)} is not allowed; {reason or str(error)}", param=name) from None


def _size(workload: Workload, order: tuple[str, str]) -> str:
    return "x".join(str(getattr(workload, side)) for side in order)


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
