"""The one list of what a Diffusers folder of Wan2.2 text-to-video holds, and what its files' headers say.

A part's weights are the files that diffusers and transformers would read, found by their rules: an index with its shards, or one
file, under the library's own name; else a variant (`...bf16.safetensors`), if there is just one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from wan_mlperf.errors import BadInput
from wan_mlperf.inputs import text

Shape = tuple[int, ...]
DTYPES = ("BF16", "F16", "F32")  # in which weights may be stored
POINTER = b"version https://git-lfs"  # what Git LFS leaves in a file's place


@dataclass(frozen=True, kw_only=True)
class Part:
    """A folder inside: `title` for people, its configuration, its weights' name, and the class that reads it, if it is one."""

    title: str
    config: str
    weights: str | None = None
    kind: str | None = None


PARTS: Mapping[str, Part] = {
    "transformer": Part(
        title="high-noise expert", config="config.json", weights="diffusion_pytorch_model", kind="WanTransformer3DModel"
    ),
    "transformer_2": Part(
        title="low-noise expert", config="config.json", weights="diffusion_pytorch_model", kind="WanTransformer3DModel"
    ),
    "vae": Part(title="VAE", config="config.json", weights="diffusion_pytorch_model", kind="AutoencoderKLWan"),
    "text_encoder": Part(title="text encoder", config="config.json", weights="model", kind="UMT5EncoderModel"),
    "tokenizer": Part(title="tokenizer", config="tokenizer_config.json"),
    "scheduler": Part(title="scheduler", config="scheduler_config.json"),
}


def where(folder: Path, part: str) -> str:
    """How an error names a part."""
    return f"model {str(folder)!r}: {part} ({PARTS[part].title})"


@dataclass(frozen=True)
class Weights:
    """The files of a part's weights, and the variant that the libraries have to be told."""

    files: tuple[Path, ...]
    variant: str | None


def find_weights(model: Path, part: str) -> Weights:
    """Find the files that the libraries would read. Raises BadInput, which says what is there instead."""
    folder, name = model / part, PARTS[part].weights
    assert name is not None
    names = sorted(one.name for one in folder.iterdir())
    variants = {match[1] for one in names if (match := re.fullmatch(rf"{name}\.([\w-]+)\.safetensors", one))}
    variants |= {match[1] for one in names if (match := re.fullmatch(rf"{name}\.safetensors\.index\.([\w-]+)\.json", one))}
    for variant in (None, *sorted(variants)):
        middle = f".{variant}" if variant else ""
        single, index = f"{name}{middle}.safetensors", f"{name}.safetensors.index{middle}.json"
        if single not in names and index not in names:
            continue
        if variant and len(variants) > 1:
            raise BadInput(f"{where(model, part)} holds the variants {', '.join(sorted(variants))}; allowed: one of them")
        if single in names and index in names:
            raise BadInput(f"{where(model, part)} holds both {single} and {index}; allowed: one of them")
        return Weights((folder / single,) if single in names else _shards(model, part, index), variant)
    others = [one for one in names if one.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf", ".safetensors", ".sft"))]
    there = f"; there is {', '.join(others[:3])}" if others else ""
    raise BadInput(
        f"{where(model, part)} has no safetensors weights{there}; allowed: {name}.safetensors, or an index with its shards"
    )


def _shards(model: Path, part: str, index: str) -> tuple[Path, ...]:
    table = read_json(model / part / index, model, part).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(one, str) for one in table.values()):
        raise BadInput(f"{where(model, part)}: {index} has no weight_map; allowed: name -> file for each weight")
    files = sorted(set(table.values()))
    for file in files:
        if file != Path(file).name:
            raise BadInput(f"{where(model, part)}: {index} names {file!r}; allowed: files beside it")
    missing = [file for file in files if not (model / part / file).is_file()]
    if missing:
        raise BadInput(f"{where(model, part)} lacks {', '.join(missing[:3])}; allowed: a whole download")
    return tuple(model / part / file for file in files)


def headers(model: Path, part: str, files: tuple[Path, ...]) -> dict[str, tuple[str, Shape]]:
    """Return name -> (dtype, shape) of the tensors in `files`, from their headers. Raises BadInput."""
    found: dict[str, tuple[str, Shape]] = {}
    for file in files:
        refuse_pointer(file, model, part)
        try:
            with safe_open(file, framework="pt") as stored:  # reads the header, and refuses a file of another length
                for name in stored.keys():  # noqa: SIM118 (not a mapping)
                    tensor = stored.get_slice(name)
                    if name in found:
                        raise BadInput(f"{where(model, part)}: {name} is in {file.name} and in a file before it")
                    found[name] = tensor.get_dtype(), tuple(tensor.get_shape())
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{where(model, part)}: {file.name} is damaged ({' '.join(str(error).split())[:160]})") from None
    return found


def refuse_pointer(file: Path, model: Path, part: str) -> None:
    """Raise BadInput for what Git LFS leaves where it has not fetched a file, and for a file that cannot be opened."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(POINTER))
    except OSError as error:
        raise BadInput(f"{where(model, part)}: {file.name} cannot be read ({error.strerror})") from None
    if start == POINTER:
        raise BadInput(f"{where(model, part)}: {file.name} is a Git LFS pointer, not the file; allowed: after `git lfs pull`")


def read_json(file: Path, model: Path, part: str | None) -> dict[str, Any]:
    """Return a configuration. Raises BadInput for what is not a mapping."""
    whose = where(model, part) if part else f"model {str(model)!r}"
    if part:
        refuse_pointer(file, model, part)
    values = text.read_json(file, what=f"{whose}:", allowed="a JSON object, as it was published")
    if not isinstance(values, dict):
        raise BadInput(f"{whose}: {file.name} holds no mapping")
    return values
