"""Identifies a checkpoint by a hash of the content of every file that is loaded, wherever the folder is and whatever it links to.

Reading 126 GB takes a minute or more, so each file's hash is remembered together with the file's inode, size and times.
Writing to a file changes its ctime, which no program can set back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from wan_mlperf import process
from wan_mlperf.errors import BadInput
from wan_mlperf.files import atomic_write, cache_folder, reason
from wan_mlperf.model_folder.parts import PARTS

BLOCK = 1 << 22
LONG = 8 << 30  # bytes; reading more than this takes long enough to tell the user
REMEMBERED = "content.json"


def identity(folder: Path) -> str:
    """Return the hash of a checkpoint's files. Raises BadInput if a file cannot be read."""
    files = [
        folder / "model_index.json",
        *(file for part in PARTS for file in sorted((folder / part).iterdir()) if file.is_file()),
    ]
    try:
        found = hashes(files)
    except OSError as error:
        raise BadInput(f"model {str(folder)!r}: cannot be read ({reason(error)}: {error.filename})") from None
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder).as_posix()} {found[file]}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def hashes(files: list[Path]) -> dict[Path, str]:
    """Return the SHA-256 of each file, remembered from an earlier call if the file has not changed since."""
    memory = _memory()
    known: dict[str, str] = _read(memory) if memory else {}
    marks = {file: _mark(file) for file in files}
    new = [file for file in files if marks[file] not in known]
    if sum(file.stat().st_size for file in new) > LONG:
        process.note(f"reading {sum(file.stat().st_size for file in new) / 1e9:.0f} GB once, to identify the model")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as readers:
        known |= dict(zip((marks[file] for file in new), readers.map(sha256, new), strict=True))
    if new and memory:
        with contextlib.suppress(OSError):  # without the cache, the next call only takes longer
            memory.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(memory, json.dumps(known, indent=1))
    return {file: known[marks[file]] for file in files}


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _mark(file: Path) -> str:
    """Identify this version of a file: its device, inode, size and times. Every change of the file changes it."""
    found = file.stat()
    return ":".join(map(str, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)))


def _memory() -> Path | None:
    try:
        return cache_folder() / REMEMBERED
    except BadInput:
        return None


def _read(file: Path) -> dict[str, str]:
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
        return {key: one for key, one in values.items() if isinstance(one, str)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
