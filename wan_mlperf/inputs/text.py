"""The one reader of text files: encodings, byte order marks, line ends, and streams that can be read only once.

A stream (a pipe such as `<(command)`, /dev/stdin, `-`) is read by one process of a job, which passes the content to the others:
the launcher with copies (`hand_over`), under torchrun rank 0 (`replicas/together.py`).
"""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any, BinaryIO

from wan_mlperf.errors import BadInput

COPIES = "WAN_MLPERF_STREAMS"  # set by `launch`: stream -> the file that holds what was read from it
MOST = 1 << 26  # bytes; nobody writes a longer text, and /dev/zero never ends
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# First bytes of files that are not text, by the name that people know.
KINDS = (
    (b"PK\x03\x04", "a ZIP file (such as .docx or .xlsx)"),
    (b"\x1f\x8b", "a gzip file"),
    (b"%PDF", "a PDF file"),
    (b"PAR1", "a Parquet file"),
    (b"{\\rtf", "an RTF file"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x7fELF", "a program"),
)
BROKEN_JSON = re.compile(r"""\[\s*(["{[]|\n|$)|\{\s*("|\n|$)""")  # how it starts; a prompt in brackets goes on with a word
OPENED = re.compile(r"/dev/fd/\d+|/proc/self/fd/\d+|/dev/stdin|-")
_read: dict[str, bytes] = {}  # streams that this process has read


def read_text(path: str | Path, *, what: str, allowed: str) -> str:
    """Return a file's text without its byte order mark, which names the encoding. Without a mark it is UTF-8.

    Raises BadInput: "{what} 'path': cannot be read (reason); allowed: {allowed}".
    """
    try:
        return decode(read_bytes(path))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"{what} {str(path)!r}: cannot be read ({why}); allowed: {allowed}") from None


def decode(content: bytes) -> str:
    """Decode bytes. Raises a ValueError that says what is wrong, and where."""
    kind = next((name for start, name in KINDS if content.startswith(start)), None)
    if kind:
        raise ValueError(f"{kind}, not text")
    mark, encoding = next((one for one in MARKS if content.startswith(one[0])), (b"", "utf-8"))
    content = content[len(mark) :]
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        name = "UTF-8" if encoding == "utf-8" else encoding.upper()
        raise ValueError(f"not {name} text: byte 0x{content[error.start]:02x} in line {line}") from None
    if "\0" in text:
        raise ValueError("not UTF-8 text: it holds NUL characters")
    return text


def lines(text: str) -> list[str]:
    """Split at \\n and \\r\\n only: other Unicode separators are part of a line. A byte order mark at its start is dropped."""
    return [line.removesuffix("\r").lstrip("\ufeff") for line in text.split("\n")]


def read_json(path: str | Path, *, what: str, allowed: str) -> Any:
    """Return the content of a JSON file. Raises BadInput, also for a duplicate key."""
    text = read_text(path, what=what, allowed=allowed)
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        why = "nested too deeply"
    except ValueError as error:
        why = " ".join(str(error).split())[:160]
    raise BadInput(f"{what} {str(path)!r}: cannot be read ({why}); allowed: {allowed}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} is given twice")
        found[key] = value
    return found


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts of a text file: one per line, without empty lines. Raises BadInput, also for another file format."""
    allowed = "a text file, one prompt a line"
    text = read_text(path, what="prompts", allowed=allowed)
    kind = other_format(path, text)
    if kind:
        raise BadInput(f"prompts {str(path)!r}: is {kind}; allowed: {allowed}")
    prompts = [line.strip() for line in lines(text) if line.strip()]
    if not prompts:
        raise BadInput(f"prompts {str(path)!r}: holds no prompt; allowed: {allowed}")
    return prompts


def other_format(path: str | Path, text: str) -> str | None:
    """Return what kind of file this is, if it is not plain text with one entry per line."""
    suffix = Path(path).suffix.lower()
    if suffix in (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".yaml", ".yml", ".xml", ".html", ".htm", ".rtf", ".toml"):
        return f"{suffix[1:].upper()} by its name"
    start = text.lstrip()
    if start.startswith("{\\rtf"):
        return "an RTF file"
    if re.match(r"<(!doctype|html|\?xml)\b", start, re.I):
        return "HTML or XML"
    full = [line.strip() for line in lines(text) if line.strip()]
    if isinstance(_json(start), dict | list):
        return "JSON"
    if any(isinstance(_json(line), dict | list) for line in full):
        return "JSON, one value a line"
    if BROKEN_JSON.match(start):
        return "JSON, and damaged"
    if len(full) > 1 and all(isinstance(_json(line), str) for line in full):
        return "a list of quoted texts"
    if len(full) > 1 and all(line.startswith("- ") for line in full):
        return "a YAML list"
    if "\r" in text.strip() and "\n" not in text.strip():
        return "text whose lines end with a carriage return alone"
    return None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_bytes(path: str | Path) -> bytes:
    """Return a file's bytes. A stream is read once and remembered. Raises OSError, or ValueError for an endless stream."""
    name = str(path)
    if name in _read:
        return _read[name]
    copies = json.loads(os.environ.get(COPIES, "{}"))
    if name in copies:
        return Path(copies[name]).read_bytes()
    with _open(name) as stream:
        content = stream.read(MOST + 1)
        is_stream = not stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    if len(content) > MOST:
        raise ValueError(f"more than {MOST >> 20} MiB")
    if is_stream or OPENED.fullmatch(name):
        _read[name] = content
    return content


def _open(name: str) -> BinaryIO:
    """Open a file for reading. torchrun does not pass on /dev/fd/N that it was given, so a rank uses its parent's."""
    if name in ("-", "/dev/stdin", "/proc/self/fd/0", "/dev/fd/0"):
        if sys.stdin is None:
            raise OSError(9, "the standard input is closed")
        return open(os.dup(0), "rb")
    if OPENED.fullmatch(name) and not os.path.exists(name):
        return open(f"/proc/{os.getppid()}/fd/{name.rpartition('/')[2]}", "rb")
    return open(name, "rb")


def may_be_stream(path: str | Path) -> bool:
    """True for something that can be read only once."""
    try:
        return OPENED.fullmatch(str(path)) is not None or not stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def remember(path: str | Path, content: bytes) -> None:
    """Note the content of `path`, which another rank has read."""
    _read[str(path)] = content


def hand_over(folder: Path) -> dict[str, str]:
    """Write what was read from streams to `folder`. Returns the environment variables by which started processes find it."""
    copies = {}
    for number, (name, content) in enumerate(_read.items()):
        copies[name] = str(folder / f"stream-{number}")
        Path(copies[name]).write_bytes(content)
    return {COPIES: json.dumps(copies)} if copies else {}
