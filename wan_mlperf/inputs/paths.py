"""Paths that a user named. They are used literally, never parsed as YAML; only `~` is expanded."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from wan_mlperf.errors import BadInput


def expand(text: str, *, what: str) -> Path:
    """Return the path that `text` names, with `~` and `~user` expanded. Raises BadInput for what cannot be a path."""
    if not text:
        raise BadInput(f"{what}: '' is empty; allowed: a path")
    if "\0" in text:
        raise BadInput(f"{what} {text!r}: holds a NUL character; allowed: a path")
    if not text.startswith("~"):
        return Path(text)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and text.split("/", 1)[0] == "~":
        raise BadInput(f"{what} {text!r}: there is no home folder (HOME is not set); allowed: a path without ~")
    return Path(expanded)  # ~nobody-of-that-name is a file's name, as it is for a shell


def look(path: Path, *, what: str) -> os.stat_result | None:
    """Return a path's status, following links; None if nothing is there. Raises BadInput if it cannot be determined."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"{what} {str(path)!r}: cannot be opened ({why}); allowed: a path that can be read") from None


def is_folder(path: Path, *, what: str) -> bool:
    """True if there is such a folder. Raises BadInput as `look` does."""
    found = look(path, what=what)
    return found is not None and stat.S_ISDIR(found.st_mode)


def is_file(path: Path, *, what: str) -> bool:
    """True if there is something to read other than a folder: a file, a pipe, a device. Raises BadInput as `look` does."""
    found = look(path, what=what)
    return found is not None and not stat.S_ISDIR(found.st_mode)


def utf8(text: str, *, what: str) -> str:
    """Return `text` if it can be encoded as UTF-8, which files and libraries require. Raises BadInput."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{what} {text!r}: is not valid UTF-8; allowed: text in UTF-8") from None
    return text
