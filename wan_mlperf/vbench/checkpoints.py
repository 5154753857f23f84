"""The checkpoints that VBench's dimensions load: where each belongs, where to get it, and its hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from wan_mlperf.files import scratch


@dataclass(frozen=True, kw_only=True)
class VBenchCheckpoint:
    """What a dimension needs: `path` in the checkpoint folder, which is a file, or a folder that contains `inside`."""

    path: str
    address: str
    dimensions: tuple[str, ...]
    inside: tuple[str, ...] = ()
    how: str = ""
    sha256: str = ""


# The paths and addresses are those of VBench 0.1.5 in local mode, as in MLCommons' reference. Tag2Text opens the last one by
# name. The first one is code: VBench runs its hubconf.py.
CHECKPOINTS = (
    VBenchCheckpoint(
        path="dino_model/facebookresearch_dino_main",
        address="https://github.com/facebookresearch/dino",
        dimensions=("subject_consistency",),
        inside=("hubconf.py",),
        how="git clone",
    ),
    VBenchCheckpoint(
        path="dino_model/dino_vitbase16_pretrain.pth",
        address="https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        dimensions=("subject_consistency",),
    ),
    VBenchCheckpoint(
        path="clip_model/ViT-B-32.pt",
        address="https://openaipublic.azureedge.net/clip/models/"
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        dimensions=("background_consistency", "appearance_style"),
        sha256="40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    ),
    VBenchCheckpoint(
        path="amt_model/amt-s.pth",
        address="https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth",
        dimensions=("motion_smoothness",),
    ),
    VBenchCheckpoint(
        path="raft_model/models/raft-things.pth",
        address="https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip",
        dimensions=("dynamic_degree",),
        how="unpack in raft_model",
    ),
    VBenchCheckpoint(
        path="caption_model/tag2text_swin_14m.pth",
        address="https://huggingface.co/spaces/xinyu1205/recognize-anything/resolve/main/tag2text_swin_14m.pth",
        dimensions=("scene",),
    ),
    VBenchCheckpoint(
        path="bert-base-uncased",
        address="https://huggingface.co/google-bert/bert-base-uncased",
        dimensions=("scene",),
        inside=("config.json", "vocab.txt", "model.safetensors"),
        how="its config.json, vocab.txt and model.safetensors",
    ),
)


def checkpoint_folder() -> Path:
    """Return where VBench keeps its checkpoints: $VBENCH_CACHE_DIR, or else ~/.cache/vbench."""
    return Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench").absolute()


def needed(dimensions: Iterable[str]) -> list[VBenchCheckpoint]:
    """Return the checkpoints of these dimensions."""
    chosen = set(dimensions)
    return [one for one in CHECKPOINTS if chosen & set(one.dimensions)]


def locate(checkpoint: VBenchCheckpoint) -> Path | None:
    """Return where a checkpoint is, or None. BERT may also be in the Hugging Face cache, where VBench would put it."""
    places = [checkpoint_folder() / checkpoint.path]
    if checkpoint.path == "bert-base-uncased":
        found = [try_to_load_from_cache(name, "config.json") for name in ("bert-base-uncased", "google-bert/bert-base-uncased")]
        places += [Path(file).parent for file in found if isinstance(file, str)]
    for place in places:
        if all((place / name).is_file() for name in checkpoint.inside) if checkpoint.inside else place.is_file():
            return place.absolute()
    return None


def missing(dimensions: Iterable[str]) -> list[str]:
    """Return one line per missing checkpoint: where to download it, and where to put it."""
    return [
        f"{one.address}{f' ({one.how})' if one.how else ''} -> {checkpoint_folder() / one.path}"
        for one in needed(dimensions)
        if locate(one) is None
    ]


def hashes(dimensions: Iterable[str]) -> dict[str, str]:
    """Return path -> SHA-256 of these dimensions' checkpoints."""
    return {one.path: digest(path) for one in needed(dimensions) if (path := locate(one)) is not None}


def not_the_published(found: Mapping[str, str]) -> list[str]:
    """Return the checkpoints that differ from the publisher's, where the publisher names a hash."""
    return [one.path for one in CHECKPOINTS if one.sha256 and found.get(one.path, one.sha256) != one.sha256]


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of all files of a folder."""
    result = hashlib.sha256()
    inside = [path]
    if path.is_dir():
        hidden = {".git", "__pycache__"}
        inside = sorted(file for file in path.rglob("*") if file.is_file() and not hidden & set(file.relative_to(path).parts))
    for file in inside:
        if file != path:
            result.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                result.update(block)
    return result.hexdigest()


@contextmanager
def surroundings() -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield a working folder and environment variables with which VBench finds every checkpoint and downloads nothing.

    Two checkpoints are opened by name only: BERT in the working folder, and DINO's weights in torch.hub's folder.
    """
    with scratch("vbench") as folder:
        hub = folder / "torch" / "hub" / "checkpoints"
        hub.mkdir(parents=True)
        for one in CHECKPOINTS:
            found = locate(one)
            if found is not None and one.path == "bert-base-uncased":
                (folder / "bert-base-uncased").symlink_to(found)
            elif found is not None and one.path.endswith("dino_vitbase16_pretrain.pth"):
                (hub / found.name).symlink_to(found)
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        yield (
            folder,
            {
                **os.environ,
                **offline,
                "TMPDIR": str(folder),  # what a killed worker leaves there is removed with it
                "TORCH_HOME": str(folder / "torch"),
                "VBENCH_CACHE_DIR": str(checkpoint_folder()),
            },
        )
