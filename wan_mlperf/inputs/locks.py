"""Locks a folder for one process, because two runs must not write into the same one. Some file systems have no locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from wan_mlperf import files
from wan_mlperf.errors import BadInput

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


def lock(
    folder: Path,
    *,
    what: str,
    busy: str = "another run writes there",
    wait_s: float = 0.0,
    without: Callable[[str], object] | None = None,
) -> int | None:
    """Lock a folder until the returned descriptor is passed to `unlock`, or until this process ends.

    Raises BadInput if another process still holds the lock after `wait_s`. On file systems without locks (NFS without its lock
    service) it raises BadInput, too; or, if `without` is given, it calls `without` with the problem and returns None.
    """
    until = time.monotonic() + wait_s
    file = folder / LOCK
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.exists(file) and os.path.samestat(os.fstat(descriptor), file.stat()):
                    files.note_here(file)
                    return descriptor
                os.close(descriptor)  # its last holder has just removed it
                continue
            except BaseException:
                os.close(descriptor)
                raise
        except BlockingIOError:
            if time.monotonic() >= until:
                raise BadInput(f"{what} {str(folder)!r}: {busy}; allowed: another folder, or wait for it") from None
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise BadInput(f"{what} {str(folder)!r}: cannot be locked ({error.strerror}); allowed: another folder") from None
            problem = f"{what} {str(folder)!r}: its file system has no locks ({error.strerror})"
            if without is None:
                raise BadInput(f"{problem}; allowed: another folder, or --no-lock if no other run writes there") from None
            without(f"{problem}; going on without one")
            return None


def unlock(folder: Path, descriptor: int | None) -> None:
    """Release the lock."""
    if descriptor is not None:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        files.forget(folder / LOCK)
        os.close(descriptor)
