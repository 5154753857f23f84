"""The git checkout that made the results: its commit, and the files of that commit."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path, PurePosixPath

from wan_mlperf.errors import BadInput


def inspect(source: Path) -> tuple[str, str | None]:
    """Return the commit of a checkout, and what is wrong with it. Raises BadInput for what is not a checkout."""
    commit = _git(source, "rev-parse", "HEAD").strip()
    lines = _git(source, "status", "--porcelain").splitlines()
    if not lines:
        return commit, None
    return commit, f"the source tree is dirty, {len(lines)} files such as {lines[0][3:]!r}; allowed: a commit without changes"


def archive(source: Path, commit: str, place: Path) -> None:
    """Write the files of a commit: nothing else from the checkout, and no hidden files, which MLCommons refuses."""
    top = _git(source, "rev-parse", "--show-toplevel").strip()
    done = subprocess.run(["git", "archive", "--format=tar", commit], cwd=top, capture_output=True, check=True, timeout=600)
    place.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as stream:
        shown = [one for one in stream if not any(part.startswith(".") for part in PurePosixPath(one.name).parts)]
        stream.extractall(place, members=shown, filter="data")


def _git(source: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=source, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise BadInput(
            f"source {str(source)!r}: git does not answer ({' '.join(str(reason).split())}); allowed: a checkout"
        ) from None
    return done.stdout
