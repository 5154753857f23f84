"""Lists the parts of a Wan2.2 text-to-video folder in the Diffusers layout, and reads the headers of their files.

A part's weights are the files that diffusers and transformers would read, found by their rules: an index with its shards or one
file, under the library's own name; otherwise a variant (`...bf16.safetensors`), if there is exactly one.
"""

from __future__ import annotations

import codecs
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from wan_mlperf.errors import BadInput
from wan_mlperf.inputs import text

Shape = tuple[int, ...]
DTYPES = ("BF16", "F16", "F32")  # in which weights may be stored
POINTER = b"version https://git-lfs"  # how the placeholder starts for a file that Git LFS has not fetched
MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32-LE's begins with UTF-16-LE's
PIECE = 1 << 22  # values of a weight that are read and cast at a time
MOST_THREADS = 16  # that read and cast; each holds a layer: 141 MB in bf16 at the benchmark's size, and its packed copy


@dataclass(frozen=True, kw_only=True)
class Part:
    """One folder of the model: `title` for messages, its configuration file, its weights' base name, the class that reads it."""

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
    """Return the words by which messages name a part."""
    return f"model {str(folder)!r}: {part} ({PARTS[part].title})"


@dataclass(frozen=True)
class Weights:
    """The files of a part's weights, and the `variant` argument with which the libraries load them."""

    files: tuple[Path, ...]
    variant: str | None


def find_weights(model: Path, part: str) -> Weights:
    """Find the files that the libraries would read. Raises BadInput, saying what is there instead."""
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
    there = f" (found: {', '.join(others[:3])})" if others else ""
    raise BadInput(
        f"{where(model, part)} has no safetensors weights{there}; allowed: {name}.safetensors, or an index with its shards"
    )


def _shards(model: Path, part: str, index: str) -> tuple[Path, ...]:
    whole = read_json(model / part / index, model, part)
    table = whole.get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(one, str) for one in table.values()):
        raise BadInput(f"{where(model, part)}: {index} has no weight_map; allowed: name -> file for each weight")
    ours = PARTS[part].kind == "WanTransformer3DModel"  # expert_weights.py reads it; the libraries look into the metadata
    if not isinstance(whole.get("metadata", {} if ours else None), dict):
        raise BadInput(f"{where(model, part)}: {index} has no metadata; allowed: an object, such as {{}}")
    files = sorted(set(table.values()))
    for file in files:
        if file != Path(file).name:
            raise BadInput(f"{where(model, part)}: {index} names {file!r}; allowed: files in the same folder")
    missing = [file for file in files if not (model / part / file).is_file()]
    if missing:
        raise BadInput(f"{where(model, part)} lacks {', '.join(missing[:3])}; allowed: a complete download")
    return tuple(model / part / file for file in files)


def on_the_way(numbers: int, threads: int) -> int:
    """Bytes of host memory, at most, for layers on their way to a GPU, in bf16 and while they are cast; see expert_weights.py.

    `numbers` is the number of weights in the largest layer. One layer more than there are threads may be waiting.
    """
    return (min(threads, MOST_THREADS) + 1) * 2 * numbers + min(threads, MOST_THREADS) * 4 * PIECE


def headers(model: Path, part: str, files: tuple[Path, ...]) -> dict[str, tuple[str, Shape]]:
    """Return name -> (dtype, shape) of the tensors in `files`, from their headers. Raises BadInput."""
    found: dict[str, tuple[str, Shape]] = {}
    for file in files:
        refuse_pointer(file, model, part)
        try:
            with safe_open(file, framework="pt") as stored:  # reads the header only, and refuses a file of the wrong length
                for name in stored.keys():  # noqa: SIM118 (not a mapping)
                    tensor = stored.get_slice(name)
                    if name in found:
                        raise BadInput(f"{where(model, part)}: {name} is in {file.name} and in an earlier file")
                    found[name] = tensor.get_dtype(), tuple(tensor.get_shape())
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{where(model, part)}: {file.name} is damaged ({' '.join(str(error).split())[:160]})") from None
    return found


def refuse_pointer(file: Path, model: Path, part: str) -> None:
    """Raise BadInput for what is no file, a file that cannot be opened, or one that is only a Git LFS pointer."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # opening a pipe would wait for its other end
            raise BadInput(f"{where(model, part)}: {file.name} is a folder, a pipe or a device; allowed: a file")
        with file.open("rb") as stream:
            start = stream.read(len(POINTER))
    except OSError as error:
        raise BadInput(f"{where(model, part)}: {file.name} cannot be read ({error.strerror})") from None
    # Of the JSON files we read the scheduler's ourselves, with a mark or without; diffusers and transformers take plain UTF-8.
    if part != "scheduler" and file.suffix == ".json" and start.startswith(MARKS):
        raise BadInput(f"{where(model, part)}: {file.name} starts with a byte order mark; allowed: UTF-8 without one")
    if start == POINTER:
        raise BadInput(f"{where(model, part)}: {file.name} is a Git LFS pointer; allowed: the file itself (git lfs pull)")


def read_json(file: Path, model: Path, part: str | None) -> dict[str, object]:
    """Return a configuration. Raises BadInput if it is not a JSON object."""
    whose = where(model, part) if part else f"model {str(model)!r}"
    if part:
        refuse_pointer(file, model, part)
    values = text.read_json(file, what=f"{whose}:", allowed="the JSON object as it was published")
    if not isinstance(values, dict):
        raise BadInput(f"{whose}: {file.name} is not a JSON object; allowed: the JSON object as it was published")
    return values
