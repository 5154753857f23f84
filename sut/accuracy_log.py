"""LoadGen's accuracy log: every response as hexadecimal text, 448 MB for a 720p video and 111 GB for all 248.

Before a run, the disk is checked for room. During the run, a response is held back until LoadGen has written all but the latest
one, so rank 0's memory stays flat on a slow disk. After it, the SHA-256 of the whole log and its first and last 4 KiB are kept,
which is what a submission contains, and the whole log is deleted. This module does not import LoadGen, because scoring uses it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from wan_mlperf.errors import BadInput, Failed
from wan_mlperf.files import atomic_write
from wan_mlperf.workload import Workload

NAME = "mlperf_log_accuracy.json"
WHOLE = "mlperf_log_accuracy.whole.json"  # the whole log's name if it is kept
SEAL = "mlperf_log_accuracy.sha256.json"
KEPT = 4096  # bytes of the start and of the end; MLCommons' checker takes 10 KiB in all
AHEAD = 2  # responses that LoadGen may hold before they are on disk
STUCK_S = 300.0  # if the log has not grown for this long, the disk is full or broken
ENTRY = 120  # at most this many bytes of an entry are not its data


@dataclass(frozen=True, kw_only=True)
class Seal:
    """SHA-256 and size in bytes of the whole log."""

    sha256: str
    bytes: int


def response_bytes(workload: Workload) -> int:
    """Bytes of one response: uncompressed uint8 frames."""
    return workload.frames * workload.height * workload.width * 3


def check_space(folder: Path, workload: Workload, samples: int) -> None:
    """Raise BadInput if the accuracy log and the videos of `samples` do not fit on the disk of `folder`."""
    # Two digits per byte. An H.264 video, even of noise, is smaller than a twentieth of its frames.
    need = samples * (2 * response_bytes(workload) + ENTRY + response_bytes(workload) // 20) + 2**20
    free = shutil.disk_usage(folder).free
    if free < need:
        raise BadInput(
            f"output folder {str(folder)!r}: {_gb(free)} free; allowed: {_gb(need)} for an accuracy run, as LoadGen logs each of "
            f"the {samples} videos as text until the run is over (--outputs FOLDER: on a larger disk)"
        )


class Backlog:
    """Holds responses back while LoadGen is still writing earlier ones. Called from one thread at a time."""

    def __init__(self, folder: Path, *, stuck_s: float = STUCK_S) -> None:
        self._log, self._stuck_s = folder / NAME, stuck_s
        self._given: list[int] = []  # bytes of the log when each response so far is written

    def wait(self) -> None:
        """Return when all but the last `AHEAD` - 1 responses are on disk. Raises Failed if the log stops growing."""
        if len(self._given) < AHEAD:
            return
        need, size, since = self._given[-AHEAD], -1, time.monotonic()
        while (now := self._log.stat().st_size) < need:
            if now > size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > self._stuck_s:
                raise Failed(f"{self._log} has not grown for {self._stuck_s:.0f} s: is the disk full?")
            time.sleep(0.01)

    def add(self, size: int) -> None:
        """Note that a response of `size` bytes was handed over."""
        self._given.append((self._given[-1] if self._given else 0) + 2 * size)


def seal(folder: Path, *, keep: bool) -> Seal:
    """Cut the log of a finished run. Once hash and cut are on disk, the whole log is deleted, or with `keep` renamed."""
    log, cut = folder / NAME, folder / f".{NAME}.cut"
    found = truncate(log, cut)
    atomic_write(folder / SEAL, json.dumps(asdict(found)) + "\n")
    if keep:
        log.replace(folder / WHOLE)
    cut.replace(log)
    return found


def read_seal(folder: Path) -> Seal | None:
    """Return what `seal` wrote, or None for a run without it. Raises Failed if it cannot be read."""
    try:
        return Seal(**json.loads((folder / SEAL).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise Failed(f"{folder / SEAL}: cannot be read ({error}): make the accuracy run again") from None


def submitted(folder: Path, target: Path) -> str:
    """Write an accuracy run's cut log to `target`, and return the SHA-256 of the whole log."""
    known = read_seal(folder)
    if known is None:
        return truncate(folder / NAME, target).sha256
    shutil.copyfile(folder / NAME, target)
    return known.sha256


def whole_sha256(folder: Path) -> str | None:
    """Return the SHA-256 of the whole log, or None for a folder without an accuracy log."""
    known = read_seal(folder)
    if known is not None:
        return known.sha256
    log = folder / NAME
    if not log.is_file():
        return None
    with log.open("rb") as stream:
        return _sha256(stream)


def truncate(log: Path, target: Path) -> Seal:
    """Write the first and last 4 KiB of a log to `target`; return the whole log's hash and size."""
    with log.open("rb") as stream:
        sha256 = _sha256(stream)
        size = stream.tell()
        stream.seek(0)
        if size <= 2 * KEPT:
            content = stream.read()
        else:
            start = stream.read(KEPT)
            stream.seek(size - KEPT)
            content = start + b"\n\n...\n\n" + stream.read()
    atomic_write(target, content)
    return Seal(sha256=sha256, bytes=size)


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
