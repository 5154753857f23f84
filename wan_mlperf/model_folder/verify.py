"""Checks that a folder is a complete Wan2.2 text-to-video checkpoint, whose every weight our classes read, from headers alone."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import AutoConfig, UMT5EncoderModel

from wan_mlperf.errors import BadInput
from wan_mlperf.model_folder import kinds
from wan_mlperf.model_folder.parts import DTYPES, PARTS, Shape, find_weights, headers, read_json, refuse_pointer, where

CLASSES: Mapping[str, type] = {one.__name__: one for one in (WanTransformer3DModel, AutoencoderKLWan, UMT5EncoderModel)}
REPEATS = ("num_layers", "num_decoder_layers", "num_res_blocks")
# UMT5 ties its two names for the token embedding: a file holds one of them or both.
TIED = {"shared.weight", "encoder.embed_tokens.weight"}
SCALES = re.compile(
    r".*(scale_weight|scale_input|weight_scale|input_scale|scaled_fp8|\.scale|\.qweight|\.qzeros|\.absmax|quant_state.*)"
)


def config_of(folder: Path, part: str) -> dict[str, Any]:
    """Return a part's configuration, with its class's defaults for what the file leaves out. Raises BadInput."""
    values = read_json(folder / part / PARTS[part].config, folder, part)
    kind = CLASSES.get(PARTS[part].kind or "")
    if kind is None or kind is UMT5EncoderModel:
        return values
    parameters = inspect.signature(kind).parameters.values()
    return {**{one.name: one.default for one in parameters if one.default is not one.empty}, **values}


def verify(folder: Path) -> None:
    """Raise BadInput if the checkpoint is incomplete or damaged, naming the part and what is wrong with it."""
    try:
        _verify(folder)
    except OSError as error:
        why = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
        raise BadInput(f"model {str(folder)!r}: cannot be read ({' '.join(why.split())[:200]})") from None


def _verify(folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        raise BadInput(f"model {str(folder)!r}: {kinds.without_index(folder)}")
    index = read_json(folder / "model_index.json", folder, None)
    vae = folder / "vae" / PARTS["vae"].config
    problem = kinds.other_model(index, config_of(folder, "vae").get("z_dim") if vae.is_file() else None)
    if problem:
        raise BadInput(f"model {str(folder)!r}: {problem}")
    for part, one in PARTS.items():
        if not (folder / part).is_dir():
            raise BadInput(f"model {str(folder)!r}: lacks {part} ({one.title}); allowed: a whole Wan2.2 text-to-video checkpoint")
        _check_class(folder, part, index)
    _check_tokenizer(folder)
    for part in PARTS:
        if PARTS[part].weights:
            _check_weights(folder, part)
    high, low = config_of(folder, "transformer"), config_of(folder, "transformer_2")
    _fit(folder, "transformer_2", "num_attention_heads", low["num_attention_heads"], high["num_attention_heads"])
    _fit(folder, "transformer_2", "in_channels", low["in_channels"], high["in_channels"])
    _fit(folder, "transformer_2", "patch_size", list(low["patch_size"]), list(high["patch_size"]))
    _fit(folder, "vae", "z_dim", config_of(folder, "vae")["z_dim"], high["in_channels"])
    _check_values(folder)
    for part, config in (("transformer", high), ("transformer_2", low)):
        _fit(folder, part, "out_channels", config["out_channels"], config["in_channels"])
        _fit(folder, part, "text_dim", config["text_dim"], config_of(folder, "text_encoder").get("d_model"))


def _check_class(folder: Path, part: str, index: Mapping[str, Any]) -> None:
    """Check that model_index.json and the part's own configuration both name the class that reads it."""
    config, kind = read_json(folder / part / PARTS[part].config, folder, part), PARTS[part].kind
    listed = index.get(part)
    named = [listed[1]] if isinstance(listed, list) and len(listed) == 2 else []
    if part == "scheduler" and named and config.get("_class_name", named[0]) != named[0]:
        raise BadInput(
            f"{where(folder, part)} is a {config['_class_name']}, but model_index.json says {named[0]}; allowed: the same"
        )
    if kind is None:
        return
    own = config.get("_class_name", kind)
    for name in (*named, own if part != "text_encoder" else kind):
        if name != kind:
            raise BadInput(f"{where(folder, part)} is a {name}; allowed: a {kind}")
    if config.get("quantization_config"):
        raise BadInput(f"{where(folder, part)} is quantised (quantization_config); allowed: weights in bf16, fp16 or fp32")


def _check_tokenizer(folder: Path) -> None:
    names = [one for one in sorted((folder / "tokenizer").iterdir()) if one.suffix in (".json", ".model")]
    for file in names:
        refuse_pointer(file, folder, "tokenizer")
    if not any(file.name == "tokenizer.json" or file.suffix == ".model" for file in names):
        raise BadInput(f"{where(folder, 'tokenizer')} has no tokenizer file; allowed: tokenizer.json or spiece.model")


def _check_values(folder: Path) -> None:
    """Check settings that change no weight's shape: another value would give wrong videos, or fail when all is loaded."""
    for part in ("transformer", "transformer_2"):
        config = config_of(folder, part)
        _need(folder, part, "eps", config["eps"], _is_number(config["eps"]) and config["eps"] > 0, "a number above 0")
    vae = config_of(folder, "vae")
    fixed = {"scale_factor_spatial": 8, "scale_factor_temporal": 4, "patch_size": None}  # workload.py counts on these
    for key, only in fixed.items():
        _need(folder, "vae", key, vae[key], vae[key] == only, "null" if only is None else str(only))
    channels = vae["z_dim"]
    for key in ("latents_mean", "latents_std"):
        values = vae[key]
        fits = isinstance(values, list | tuple) and len(values) == channels and all(_is_number(one) for one in values)
        if fits and key == "latents_std":
            fits = all(one > 0 for one in values)
        what = "numbers above 0" if key == "latents_std" else "numbers"
        _need(folder, "vae", key, values, fits, f"z_dim, {channels}, {what}")
    text = AutoConfig.from_pretrained(folder / "text_encoder", trust_remote_code=False)
    buckets, distance = text.relative_attention_num_buckets, text.relative_attention_max_distance
    fits = isinstance(distance, int) and distance > buckets // 2  # its logarithm is divided by
    key = "relative_attention_max_distance"
    _need(folder, "text_encoder", key, distance, fits, f"above half of relative_attention_num_buckets, {buckets // 2}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _need(folder: Path, part: str, key: str, value: object, fits: bool, allowed: str) -> None:
    if not fits:
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
        raise BadInput(f"{where(folder, part)}: {key} is {shown}; allowed: {allowed}")


def _check_weights(folder: Path, part: str) -> None:
    stored = headers(folder, part, find_weights(folder, part).files)
    for name, (dtype, _) in stored.items():
        if dtype not in DTYPES:
            if dtype == "F64":
                raise BadInput(f"{where(folder, part)}: {name} is stored in {dtype}; allowed: bf16, fp16 or fp32")
            scales = [one for one in stored if SCALES.fullmatch(one)]
            more = f" and scales such as {scales[0]}" if scales else ""
            raise BadInput(f"{where(folder, part)} is quantised: {name} is stored in {dtype}{more}; allowed: bf16, fp16 or fp32")
    for key in REPEATS:  # building a model of that many layers would not end
        count = read_json(folder / part / "config.json", folder, part).get(key)
        if isinstance(count, int) and count > len(stored):
            raise BadInput(
                f"{where(folder, part)}: {key} is {count}, but there are only {len(stored)} weights; allowed: at most as many"
            )
    kind = CLASSES[PARTS[part].kind or ""]
    makers: dict[type, Callable[[], torch.nn.Module]] = {
        UMT5EncoderModel: lambda: UMT5EncoderModel(AutoConfig.from_pretrained(folder / part, trust_remote_code=False)),
    }
    try:
        with torch.device("meta"):
            model = makers.get(kind, lambda: kind.from_config(read_json(folder / part / "config.json", folder, part)))()  # type: ignore[attr-defined]
            expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    except Exception as error:
        why = " ".join(str(error).split())[:160].strip("()") or type(error).__name__
        raise BadInput(f"{where(folder, part)} has a configuration from which no model can be built ({why})") from None
    ignored = getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or []
    _compare(folder, part, expected, {name: shape for name, (_, shape) in stored.items()}, ignored)


def _compare(folder: Path, part: str, expected: Mapping[str, Shape], stored: Mapping[str, Shape], ignored: list[str]) -> None:
    title = where(folder, part)
    tied = TIED if part == "text_encoder" and TIED & set(stored) else set()
    lacking = sorted(set(expected) - set(stored) - tied)
    if lacking:
        raise BadInput(f"{title} lacks the weight {lacking[0]}{_more(lacking)}")
    unknown = [name for name in stored if name not in expected and not any(re.search(one, name) for one in ignored)]
    if unknown:
        kind = PARTS[part].kind
        raise BadInput(
            f"{title} has weights that {kind} does not know: {', '.join(unknown[:3])}{_more(unknown, 3)}; allowed: a {kind}"
        )
    for name, shape in expected.items():
        if name in stored and stored[name] != shape:
            raise BadInput(f"{title}: {name} has shape {list(stored[name])}; its configuration needs {list(shape)}")


def _more(names: list[str], shown: int = 1) -> str:
    return f" and {len(names) - shown} more" if len(names) > shown else ""


def _fit(folder: Path, part: str, key: str, value: object, needed: object) -> None:
    if value != needed:
        raise BadInput(f"{where(folder, part)}: {key} is {value}; the other parts need {needed}")
