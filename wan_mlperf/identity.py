"""The software that made a result: versions and commit."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path

# An image cannot tell its own name from inside: whoever starts the container passes it on, best with its digest.
CONTAINER = "WAN_MLPERF_CONTAINER"
PACKAGES = ("torch", "diffusers", "transformers", "xfuser", "distvae", "torchao", "triton", "mlcommons-loadgen", "av", "numpy")
BUILT = ("xfuser", "amd-aiter", "aiter", "distvae", "flash-attn", "transformer-engine", "vbench")  # usually from a commit


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commits() -> dict[str, str]:
    """Commits of the packages that tell one: those installed from git, and torch."""
    import torch

    found = {"torch": str(torch.version.git_version)} if getattr(torch.version, "git_version", None) else {}
    for name in BUILT:
        try:
            text = importlib.metadata.distribution(name).read_text("direct_url.json")
        except importlib.metadata.PackageNotFoundError:
            continue
        if text and (made := json.loads(text).get("vcs_info", {}).get("commit_id")):
            found[name] = made
    return found


def container() -> str:
    """The container image that this runs in, as $WAN_MLPERF_CONTAINER states it; whether there is one, where it does not."""
    inside = Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()
    return os.environ.get(CONTAINER) or ("not stated" if inside else "none")


def revision_of(folder: Path) -> str:
    """The commit of the Hugging Face hub that a folder's files are of: "unknown" if it does not tell.

    A folder tells if it is the hub's cache, or if `hf download --local-dir` made it.
    """
    note = folder / ".cache" / "huggingface" / "download" / "model_index.json.metadata"
    try:
        lines = note.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    found = [*lines[:1], folder.resolve().name]
    return next((one for one in found if re.fullmatch(r"[0-9a-f]{40}", one)), "unknown")


def commit() -> str:
    """This checkout's commit, with "-dirty" if files were changed; "unknown" outside git."""
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=20)
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")
