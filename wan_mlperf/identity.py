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
FILE = Path(__file__).resolve().with_name("COMMIT")  # written by setup.py into what it builds, never in a checkout


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
    """Commits of the packages that record one: those installed from git, and torch."""
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
    """Return the container image that $WAN_MLPERF_CONTAINER states; without it, "not stated" in a container, else "none"."""
    inside = Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()
    return os.environ.get(CONTAINER) or ("not stated" if inside else "none")


def revision_of(folder: Path) -> str:
    """Return the Hugging Face hub commit that a folder's files come from, or "unknown".

    It is known for a folder of the hub's cache, and for one that `hf download --local-dir` made.
    """
    note = folder / ".cache" / "huggingface" / "download" / "model_index.json.metadata"
    try:
        lines = note.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    found = [*lines[:1], folder.resolve().name]
    return next((one for one in found if re.fullmatch(r"[0-9a-f]{40}", one)), "unknown")


def commit() -> str:
    """This package's commit, with "-dirty" if files were changed: the one a wheel was built from, or the checkout's.

    "unknown" otherwise, also where the package is installed inside another project's repository: that commit is not ours.
    """
    if FILE.is_file():
        return FILE.read_text(encoding="utf-8").strip()
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    # Ignore the repository of a git hook that this may run in; accept one that another user owns, as in a container.
    env = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    words = ["git", "-c", "safe.directory=*", *arguments]
    done = subprocess.run(words, cwd=FILE.parent, env=env, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()
