"""Find, verify and load a Diffusers checkpoint: the hub's, a local folder, or the embedded one.

Verification reads configurations and the headers of the safetensors files only, so that a folder which cannot work is refused
with the part's name before any weight is read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from wan_mlperf.errors import BadInput, did_you_mean
from wan_mlperf.files import cache_folder
from wan_mlperf.inputs.paths import expand, is_folder, utf8
from wan_mlperf.recipe import Dtype

HUB_NAME = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
HUB_REVISION = "5be7df9619b54f4e2667b2755bc6a756675b5cd7"
SAMPLED = 1 << 16  # bytes read at both ends of each weight file: hashing 126 GB would take minutes
EMBEDDED = Path(__file__).resolve().parent / "embedded"

# part -> what it is to a person
PARTS: Mapping[str, str] = {
    "transformer": "high-noise expert",
    "transformer_2": "low-noise expert",
    "vae": "VAE",
    "text_encoder": "text encoder",
    "tokenizer": "tokenizer",
    "scheduler": "scheduler",
}
Shape = tuple[int, ...]
# What a part is loaded in. "checkpoint" leaves it to the libraries, as `WanPipeline.from_pretrained(folder)` does: diffusers
# loads in fp32 whatever is stored, transformers in the dtype that the part's configuration names, or else in its weights'.
_DTYPES: Mapping[Dtype, torch.dtype | None] = {"checkpoint": None, "bfloat16": torch.bfloat16, "float32": torch.float32}


def expert_dtype(wanted: Dtype) -> torch.dtype:
    """What an expert that is loaded as `wanted` computes in; diffusers by itself loads into torch's default dtype, fp32."""
    return _DTYPES[wanted] or torch.float32


@dataclass(frozen=True)
class Checkpoint:
    """A verified Diffusers folder. `name` is what the recipe called it."""

    name: str
    folder: Path

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json."""
        return _read_json(self.folder / "model_index.json", "model_index.json")

    @cached_property
    def identity(self) -> str:
        """A hash of its files' names, sizes and both ends of each: a folder may move, its weights count."""
        digest = hashlib.sha256()
        for file in sorted(one for one in self.folder.rglob("*") if one.suffix in (".json", ".safetensors", ".model")):
            size = file.stat().st_size
            digest.update(f"{file.relative_to(self.folder)} {size}\n".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(SAMPLED))
                stream.seek(max(0, size - SAMPLED))
                digest.update(stream.read(SAMPLED))
        return digest.hexdigest()

    def config(self, part: str) -> dict[str, Any]:
        """A part's configuration."""
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        return _read_json(self.folder / part / name, f"{part} ({PARTS[part]})")

    @property
    def heads(self) -> int:
        """Attention heads of the experts."""
        return int(self.config("transformer")["num_attention_heads"])

    @property
    def boundary_ratio(self) -> float | None:
        """The checkpoint's own boundary; the workload's counts."""
        return self.index.get("boundary_ratio")

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer."""
        return AutoTokenizer.from_pretrained(self.folder / "tokenizer")

    def load_text_encoder(self, dtype: Dtype) -> UMT5EncoderModel:
        """Return the UMT5 encoder on the CPU."""
        transformers.utils.logging.disable_progress_bar()
        return UMT5EncoderModel.from_pretrained(self.folder / "text_encoder", torch_dtype=_DTYPES[dtype]).eval()

    def load_transformer(self, part: str, dtype: Dtype) -> WanTransformer3DModel:
        """Return one expert on the CPU; diffusers keeps norms and modulation in fp32."""
        return WanTransformer3DModel.from_pretrained(self.folder, subfolder=part, torch_dtype=_DTYPES[dtype]).eval()

    def load_vae(self, dtype: Dtype) -> AutoencoderKLWan:
        """Return the VAE on the CPU."""
        return AutoencoderKLWan.from_pretrained(self.folder, subfolder="vae", torch_dtype=_DTYPES[dtype]).eval()


def find(name: str) -> Checkpoint:
    """Return the verified checkpoint that a recipe or --model names: "embedded", the hub name, or a Diffusers folder.

    Raises BadInput for a name that is none of them and for a folder that lacks a part or whose shapes do not fit.
    """
    if name == "embedded":
        folder = _expand_embedded()
    elif name == HUB_NAME:
        folder = _from_hub()
    elif is_folder(expand(utf8(name, what="model"), what="model"), what="model"):
        folder = expand(name, what="model")
    else:
        raise BadInput(
            f"model {name!r}: no such folder{did_you_mean(name, ['embedded', HUB_NAME])}; allowed: embedded, {HUB_NAME}, "
            "or a Diffusers folder"
        )
    checkpoint = Checkpoint(name, folder)
    verify(checkpoint)
    return checkpoint


def verify(checkpoint: Checkpoint) -> None:
    """Raise BadInput, naming the part, if the folder lacks a part or shapes do not fit."""
    folder = checkpoint.folder
    if not (folder / "model_index.json").is_file():
        raise BadInput(f"model {folder}: has no model_index.json; allowed: a folder in the Diffusers layout")
    for part, title in PARTS.items():
        if not (folder / part).is_dir():
            raise BadInput(f"model {folder}: lacks {part} ({title}); allowed: a whole Wan2.2 text-to-video checkpoint")
        if part == "tokenizer":
            if not any((folder / part).glob("*.json")) and not any((folder / part).glob("*.model")):
                raise BadInput(f"model {folder}: {part} ({title}) has no tokenizer file")
        else:
            checkpoint.config(part)
    models = {
        "transformer": lambda: WanTransformer3DModel.from_config(checkpoint.config("transformer")),
        "transformer_2": lambda: WanTransformer3DModel.from_config(checkpoint.config("transformer_2")),
        "vae": lambda: AutoencoderKLWan.from_config(checkpoint.config("vae")),
        "text_encoder": lambda: UMT5EncoderModel(AutoConfig.from_pretrained(folder / "text_encoder")),
    }
    for part, make in models.items():
        stored = headers(folder / part, part)
        try:
            with torch.device("meta"):
                expected = {name: tuple(value.shape) for name, value in make().state_dict().items()}
        except Exception as error:
            raise BadInput(f"model {folder}: {part} ({PARTS[part]}) has a configuration that fits no model ({error})") from None
        _compare(folder, part, expected, {name: shape for name, (_, shape) in stored.items()})
    high, low = checkpoint.config("transformer"), checkpoint.config("transformer_2")
    _fit(folder, "transformer_2", "num_attention_heads", low["num_attention_heads"], high["num_attention_heads"])
    _fit(folder, "transformer_2", "in_channels", low["in_channels"], high["in_channels"])
    _fit(folder, "vae", "z_dim", checkpoint.config("vae")["z_dim"], high["in_channels"])
    for part, config in (("transformer", high), ("transformer_2", low)):
        _fit(folder, part, "text_dim", config["text_dim"], checkpoint.config("text_encoder")["d_model"])


def headers(folder: Path, part: str) -> dict[str, tuple[str, Shape]]:
    """Return name -> (dtype, shape) of all safetensors of a part, from the files' headers. Raises BadInput."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if indexes:
        names = set(_read_json(indexes[0], f"{part} index").get("weight_map", {}).values())
        missing = sorted(names - {file.name for file in files})
        if missing:
            raise BadInput(f"model {folder.parent}: {part} ({PARTS[part]}) lacks {', '.join(missing[:3])}")
        files = [folder / name for name in sorted(names)]
    if not files:
        raise BadInput(f"model {folder.parent}: {part} ({PARTS[part]}) has no safetensors weights")
    found: dict[str, tuple[str, Shape]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:  # reads the header, and refuses a file of another length
                for name in stored.keys():  # noqa: SIM118 (not a mapping)
                    tensor = stored.get_slice(name)
                    found[name] = tensor.get_dtype(), tuple(tensor.get_shape())
        except (OSError, SafetensorError) as error:
            raise BadInput(f"model {folder.parent}: {part} ({PARTS[part]}): {file.name} is damaged ({error})") from None
    return found


def _expand_embedded() -> Path:
    """The embedded checkpoint as a Diffusers folder in fp32, built on first use, checked by content hash after that.

    The package ships 16-bit weights; in fp32 every library loads the same values whatever dtype it defaults to, as the parts'
    configurations say fp32, too. Several ranks may come at once: each builds aside and the first rename wins.
    """
    sources = sorted(file for file in EMBEDDED.rglob("*") if file.is_file())
    if not sources:
        raise BadInput(f"model 'embedded': {EMBEDDED} is empty; reinstall the package, or name another model")
    digest = hashlib.sha256(b"configurations in fp32")  # what is done to the sources below
    for file in sources:
        digest.update(str(file.relative_to(EMBEDDED)).encode() + b"\0" + file.read_bytes())
    final = cache_folder() / f"embedded-{digest.hexdigest()[:16]}"
    if _is_whole(final):
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".embedded-", dir=final.parent))
    except OSError as error:
        raise BadInput(f"cache folder {final.parent}: {error.strerror}; allowed: a writable folder (WAN_MLPERF_CACHE)") from None
    try:
        for file in sources:
            target = work / file.relative_to(EMBEDDED)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors":
                save_file({name: value.float() for name, value in load_file(file).items()}, target, {"format": "pt"})
            else:
                shutil.copyfile(file, target)
            if file.name == "config.json" and "dtype" in (config := json.loads(file.read_text(encoding="utf-8"))):
                target.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
        (work / "SHA256.json").write_text(json.dumps(_hashes(work), indent=1))
        if final.exists() and not _is_whole(final):  # damaged: out of the way, and away
            final.rename(work.with_name(work.name + "-damaged"))
        work.rename(final)
    except OSError:
        if not _is_whole(final):  # else another rank was first, and its folder is as good
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(work.with_name(work.name + "-damaged"), ignore_errors=True)
    return final


def _is_whole(folder: Path) -> bool:
    try:
        wanted = json.loads((folder / "SHA256.json").read_text())
        return bool(wanted) and wanted == _hashes(folder)
    except (OSError, ValueError):
        return False


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "SHA256.json")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _from_hub() -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(HUB_NAME, revision=HUB_REVISION))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise BadInput(
            f"model {HUB_NAME!r}: revision {HUB_REVISION[:12]} is neither in the local Hugging Face cache nor reachable "
            f"({type(error).__name__}); allowed: a host with access or a downloaded folder"
        ) from None


def _read_json(file: Path, what: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"model {file.parent}: {what}: {file.name} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise BadInput(f"model {file.parent}: {what}: {file.name} is not JSON") from None
    if not isinstance(value, dict):
        raise BadInput(f"model {file.parent}: {what}: {file.name} holds no mapping")
    return value


def _compare(folder: Path, part: str, expected: Mapping[str, Shape], stored: Mapping[str, Shape]) -> None:
    title = f"model {folder}: {part} ({PARTS[part]})"
    # UMT5 ties its two names for the token embedding: a file holds one of them.
    tied = {"shared.weight", "encoder.embed_tokens.weight"} if part == "text_encoder" else set()
    lacking = sorted(set(expected) - set(stored) - tied)
    if lacking:
        raise BadInput(f"{title} lacks the weight {lacking[0]} and {len(lacking) - 1} more")
    for name, shape in expected.items():
        if name in stored and stored[name] != shape:
            raise BadInput(f"{title}: {name} has shape {list(stored[name])}; its configuration needs {list(shape)}")


def _fit(folder: Path, part: str, key: str, value: object, needed: object) -> None:
    if value != needed:
        raise BadInput(f"model {folder}: {part} ({PARTS[part]}): {key} is {value}; the other parts need {needed}")
