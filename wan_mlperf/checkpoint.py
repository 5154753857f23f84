"""Find, verify and load a Diffusers checkpoint: the hub's, a local folder, or the embedded one.

Verification reads only configurations and the headers of safetensors files, so a folder that cannot work is refused, with the
part's name, before any weight is read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from wan_mlperf import ranks
from wan_mlperf.errors import BadInput, did_you_mean
from wan_mlperf.files import cache_folder, reason, scratch
from wan_mlperf.identity import revision_of
from wan_mlperf.inputs.paths import expand, is_file, is_folder, utf8
from wan_mlperf.model_folder import content, parts
from wan_mlperf.model_folder.expert_weights import CPU, Convert, load_expert, refuse_not_finite, unchanged
from wan_mlperf.model_folder.kinds import HUB, HUB_NAME
from wan_mlperf.model_folder.parts import Shape, find_weights, read_json
from wan_mlperf.model_folder.verify import config_of
from wan_mlperf.model_folder.verify import verify as verify_folder
from wan_mlperf.recipe import Dtype

Model = TypeVar("Model", bound=torch.nn.Module)

HUB_REVISION = "5be7df9619b54f4e2667b2755bc6a756675b5cd7"
EMBEDDED = Path(__file__).resolve().parent / "embedded"

# The dtype a part is loaded in. "checkpoint" leaves it to the libraries, as `WanPipeline.from_pretrained(folder)` does: diffusers
# loads in fp32 whatever is stored, transformers in the dtype that the part's configuration names, or else in its weights' own.
_DTYPES: Mapping[Dtype, torch.dtype | None] = {"checkpoint": None, "bfloat16": torch.bfloat16, "float32": torch.float32}


def expert_dtype(wanted: Dtype) -> torch.dtype:
    """Return the dtype that an expert loaded as `wanted` computes in; diffusers by itself loads in fp32, torch's default."""
    return _DTYPES[wanted] or torch.float32


@dataclass(frozen=True)
class Checkpoint:
    """A verified Diffusers folder. `name` is what the recipe called it."""

    name: str
    folder: Path

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json."""
        return read_json(self.folder / "model_index.json", self.folder, None)

    @cached_property
    def identity(self) -> str:
        """A hash of the content: it survives moving the folder, and changes with any weight."""
        return content.identity(self.folder)

    def config(self, part: str) -> dict[str, Any]:
        """Return a part's configuration, with defaults filled in."""
        return config_of(self.folder, part)

    @property
    def heads(self) -> int:
        """Number of attention heads of the experts."""
        return int(self.config("transformer")["num_attention_heads"])

    @property
    def boundary_ratio(self) -> float | None:
        """The checkpoint's boundary ratio. The workload's is the one that counts."""
        return self.index.get("boundary_ratio")

    @property
    def revision(self) -> str:
        """The hub commit that these files come from, or "unknown" if the folder does not record it."""
        return HUB_REVISION if self.name == HUB_NAME else revision_of(self.folder)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer. Raises BadInput if its files cannot be loaded, or do not fit the text encoder."""
        known = read_json(self.folder / "text_encoder" / "config.json", self.folder, "text_encoder").get("vocab_size")
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer", trust_remote_code=False)
            tokenizer("a", add_special_tokens=True)
            tokenizer(["a"], padding="max_length", max_length=4, truncation=True, return_tensors="pt")
            if isinstance(known, int) and len(tokenizer) > known:
                raise ValueError(f"{len(tokenizer)} tokens, and the text encoder knows {known}")
            return tokenizer
        except Exception as error:  # of any kind: a damaged file is read by three libraries
            why = " ".join(str(error).split())[:160]
            raise BadInput(f"{parts.where(self.folder, 'tokenizer')} cannot be loaded ({type(error).__name__}: {why})") from None

    def load_text_encoder(self, dtype: Dtype, *, device: torch.device = CPU) -> UMT5EncoderModel:
        """Return the UMT5 encoder (11.4 GB in bf16), loaded straight onto `device`, one tensor at a time."""
        transformers.utils.logging.disable_progress_bar()
        folder, variant = self.folder / "text_encoder", self._variant("text_encoder")
        model = UMT5EncoderModel.from_pretrained(folder, torch_dtype=_DTYPES[dtype], variant=variant, device_map={"": device})
        return self._finite(model, "text_encoder").eval()

    def load_transformer(
        self, part: str, dtype: Dtype, *, convert: Convert = unchanged, device: torch.device = CPU
    ) -> WanTransformer3DModel:
        """Return one expert on `device`, its modules converted by `convert`; norms and modulation stay in fp32 as in diffusers.

        Only a few layers at a time are in host memory, in the dtype that they compute in and not the one they are stored in.
        """
        threads = ranks.own_cores()
        return load_expert(self.folder, part, _DTYPES[dtype], convert=convert, device=device, threads=threads)

    def load_vae(self, dtype: Dtype) -> AutoencoderKLWan:
        """Return the VAE on the CPU."""
        variant = self._variant("vae")
        model = AutoencoderKLWan.from_pretrained(self.folder, subfolder="vae", torch_dtype=_DTYPES[dtype], variant=variant)
        return self._finite(model, "vae").eval()

    def _finite(self, model: Model, part: str) -> Model:
        for name, weight in model.named_parameters():
            refuse_not_finite(weight, f"{parts.where(self.folder, part)}: {name}")
        return model

    def _variant(self, part: str) -> str | None:
        return find_weights(self.folder, part).variant


def headers(folder: Path, part: str) -> dict[str, tuple[str, Shape]]:
    """Return name -> (dtype, shape) of the weights in a part's folder, from the files' headers. Raises BadInput."""
    return parts.headers(folder.parent, part, find_weights(folder.parent, part).files)


def find(name: str) -> Checkpoint:
    """Return the verified checkpoint that a recipe or --model names: "embedded", the hub name, or a Diffusers folder.

    Raises BadInput for any other name, and for a folder that lacks a part or whose shapes do not fit together.
    """
    place = expand(utf8(name, what="model"), what="model")
    if name == "embedded":
        folder = _expand_embedded()
    elif is_folder(place, what="model"):  # a local folder comes before the hub's name, as in diffusers
        folder = place
    elif name == HUB_NAME:
        folder = _from_hub()
    else:
        nearest = did_you_mean(name, ["embedded", HUB_NAME])
        kind = HUB.get(name) or ("is a file" if is_file(place, what="model") else f"no such folder{nearest}")
        raise BadInput(f"model {name!r}: {kind}; allowed: embedded, {HUB_NAME}, or a Diffusers folder")
    checkpoint = Checkpoint(name, folder)
    verify(checkpoint)
    return checkpoint


def is_here(name: str) -> bool:
    """False for the model on the hub, which may have to be downloaded."""
    return name != HUB_NAME or is_folder(Path(name), what="model")


def verify(checkpoint: Checkpoint) -> None:
    """Raise BadInput, naming the part, if the folder lacks a part or contains something that our classes do not read."""
    verify_folder(checkpoint.folder)


def _expand_embedded() -> Path:
    """Return the embedded checkpoint as a Diffusers folder in fp32. It is built on first use, and later checked by content hash.

    The package contains 16-bit weights. In fp32 every library loads the same values, whatever its default dtype, because the
    configurations say fp32, too. Several ranks may do this at once: each builds a separate folder, and the first rename wins.
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
        with scratch("embedded", inside=final.parent) as work:
            _expand(sources, work, final)
    except (OSError, SafetensorError) as error:
        why = f"{reason(error)}; allowed: a folder with 100 MB of room that can be written (WAN_MLPERF_CACHE)"
        raise BadInput(f"cache folder {str(final.parent)!r}: cannot be written ({why})") from None
    return final


def _expand(sources: Sequence[Path], work: Path, final: Path) -> None:
    """Build the folder in `work` and rename it, unless another process was first."""
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
        if final.exists() and not _is_whole(final):  # damaged: moved out of the way, then removed
            final.rename(work.with_name(work.name + "-damaged"))
        work.rename(final)
    except OSError:
        if not _is_whole(final):  # else another rank was first, and its folder is as good
            raise
    finally:
        shutil.rmtree(work.with_name(work.name + "-damaged"), ignore_errors=True)


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
        if isinstance(error, OSError) and error.errno and error.filename:  # the disk's fault, not the network's
            raise BadInput(
                f"model {HUB_NAME!r}: {error.strerror}: {error.filename!r}; allowed: room for 126 GB (HF_HOME)"
            ) from None
        raise BadInput(
            f"model {HUB_NAME!r}: revision {HUB_REVISION[:12]} is neither in the local Hugging Face cache nor reachable "
            f"({type(error).__name__}); allowed: a host with access or a downloaded folder"
        ) from None
