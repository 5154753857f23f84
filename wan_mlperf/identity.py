"""The software that made a result: versions and commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "xfuser", "distvae", "torchao", "mlcommons-loadgen", "av", "numpy")
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


def commit() -> str:
    """This package's commit, with "-dirty" if files were changed: the one a wheel was built from, or the checkout's.

    "unknown" elsewhere: a repository in whose folder the package merely lies, such as a project with its environment, has others.
    """
    if FILE.is_file():
        return FILE.read_text(encoding="utf-8").strip()
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    # Not the repository of a git hook that this may run in; and one that another user owns, as in a container, is as good.
    env = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    words = ["git", "-c", "safe.directory=*", *arguments]
    done = subprocess.run(words, cwd=FILE.parent, env=env, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()
