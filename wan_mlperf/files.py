"""Files and folders: one appears under its final name only when it is whole."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from wan_mlperf.errors import BadInput

T = TypeVar("T")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it is synced and renamed, else removed."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a file under its final name only when it is whole."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def read_prompts(file: str | Path) -> list[str]:
    """Return the prompts of a text file, one a line, empty lines left out. Raises BadInput."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise BadInput(f"prompts {str(file)!r}: cannot be read ({reason}); allowed: a text file, one prompt a line") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise BadInput(f"prompts {str(file)!r}: holds no prompt; allowed: a text file, one prompt a line")
    return prompts


def write_record(file: Path, record: Any, *, without: Collection[str] = ()) -> None:
    """Write a dataclass as JSON, without the fields named."""
    values = {key: value for key, value in dataclasses.asdict(record).items() if key not in without}
    atomic_write(file, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def read_record(file: Path, kind: type[T], *, version: int, what: str) -> T:
    """Read back a dataclass that has a `version`; `what` it belongs to ends the error line.

    Raises BadInput for a file that is not there, holds half a record, or one of another version.
    """
    allowed = f"allowed: {what} of this version"
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "half a file, or not JSON"
        raise BadInput(f"{str(file)!r}: cannot be read ({reason}); {allowed}") from None
    if not isinstance(values, dict) or "version" not in values:
        raise BadInput(f"{str(file)!r}: has no version: an older one, or another kind of file; {allowed}")
    if values["version"] != version:
        raise BadInput(f"{str(file)!r}: is of version {values['version']!r}, and this program reads {version}; {allowed}")
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"{str(file)!r}: {key}: {first['msg']}; {allowed}") from None


def cache_folder() -> Path:
    """Where built things are kept for the user: $WAN_MLPERF_CACHE, else ~/.cache/wan_mlperf."""
    return Path(os.environ.get("WAN_MLPERF_CACHE") or Path.home() / ".cache" / "wan_mlperf")


def writable_folder(folder: Path, *, what: str) -> Path:
    """Make `folder` if it is missing and check that files can be written there. Raises BadInput."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"{what} {str(folder)!r}: not writable ({reason}); allowed: a folder you can write to") from None
    return folder
