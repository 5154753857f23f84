"""Files and folders that we write. A file appears under its final name only when it is whole, and nothing temporary stays.

Temporary files exist in two places: next to the file that they become (`atomic_file`, `atomic_link`), and in `scratch`. Both are
removed however a process ends: a process that exits at once calls `clean_up`, and what a killed rank leaves behind its launcher
finds through the job's folder (`clean_up_after`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from wan_mlperf.errors import BadInput
from wan_mlperf.inputs.paths import expand

TEMPORARY = ".wan_mlperf-"  # temporary names begin with this, and not with the final name, which may have 255 bytes
JOB = "WAN_MLPERF_JOB"  # set by `launch`: the job's own folder, which is removed with it
_NOTE = "temporary-"  # prefix of the links in the job's folder to its ranks' temporary files elsewhere
_temporary: set[Path] = set()  # named files and folders to remove
_made: list[Path] = []  # folders that this process made for the user's outputs, outermost first


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to. If the block ends well, the file is synced and renamed to `path`; otherwise it is removed.

    If the file system allows it (O_TMPFILE), the file has no name until then, so not even a killed process leaves it behind. A
    device or pipe is written to directly; for a link, its target is replaced. Permissions follow the umask. Raises OSError with
    `path` as its file name.
    """
    with naming(path):
        if path.exists() and not path.is_file() and not path.is_dir():
            yield path
            return
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        name = f"{TEMPORARY}{secrets.token_hex(6)}"
        try:
            handle, is_named = _open_temporary(folder, name)
            temporary = target.parent / name
            _note(temporary)
            try:
                yield temporary if is_named else Path(f"/proc/self/fd/{handle}")
                os.fsync(handle)
                if not is_named:
                    # linkat follows /proc's link only with a folder's descriptor; without one Python calls link.
                    os.link(f"/proc/self/fd/{handle}", name, dst_dir_fd=folder)
                os.replace(name, target.name, src_dir_fd=folder, dst_dir_fd=folder)
            finally:
                os.close(handle)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)
                forget(temporary)
        finally:
            os.close(folder)


def atomic_link(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`, in one step if it was one before. Raises OSError."""
    temporary = link.parent / f"{TEMPORARY}{secrets.token_hex(6)}"
    _note(temporary)
    try:
        temporary.symlink_to(target)
        temporary.replace(link)
    finally:
        temporary.unlink(missing_ok=True)
        forget(temporary)


def note_here(path: Path) -> None:
    """Note a file, such as a lock, that only this process removes when it ends, and not its launcher if it is killed."""
    _temporary.add(path)


def _note(path: Path) -> None:
    """Note something temporary before it is made, here and for the launcher."""
    _temporary.add(path)
    if job := os.environ.get(JOB):
        with contextlib.suppress(OSError):  # then only a killed rank would leave it behind
            (Path(job) / f"{_NOTE}{path.name}").symlink_to(path.absolute())


def forget(path: Path) -> None:
    """Forget what was noted: it is gone."""
    _temporary.discard(path)
    if job := os.environ.get(JOB):
        with contextlib.suppress(OSError):
            (Path(job) / f"{_NOTE}{path.name}").unlink()


def _open_temporary(folder: int, name: str) -> tuple[int, bool]:
    """Open a new file in a folder, without a name if possible. Returns its descriptor, and whether it has the name."""
    if os.path.exists("/proc/self/fd"):
        with contextlib.suppress(OSError):  # not every file system can do this, NFS cannot
            return os.open(".", os.O_RDWR | os.O_TMPFILE, 0o666, dir_fd=folder), False
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder), True


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an OSError in the block name `path`, the name that the user knows, if it names no file or a temporary one."""
    try:
        yield
    except OSError as error:
        named = str(getattr(error, "filename", None) or "")
        if not named or named == "." or named.startswith("/proc/self/fd/") or os.path.basename(named).startswith(TEMPORARY):
            raise OSError(error.errno or 0, error.strerror or str(error), str(path)) from error
        raise


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a file under its final name only when it is whole."""
    with atomic_file(path) as temporary:
        # A name that is not valid UTF-8 is written as JSON's escapes.
        temporary.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


@contextmanager
def scratch(purpose: str, *, inside: Path | None = None) -> Iterator[Path]:
    """Yield a new folder in the temporary folder, for this user only. It is removed at the end, even if we exit at once.

    With `inside` it is made there instead, with the permissions of the umask, and may be renamed when it is complete.
    """
    if inside is None:
        folder = Path(tempfile.gettempdir()) / f"wan_mlperf-{purpose}-{secrets.token_hex(6)}"
    else:
        folder = inside / f"{TEMPORARY}{purpose}-{secrets.token_hex(6)}"
    _note(folder)
    try:
        folder.mkdir(mode=0o700 if inside is None else 0o777)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        forget(folder)


@contextmanager
def in_memory(content: bytes) -> Iterator[Path]:
    """Yield a path under which this process finds `content`, for libraries that want a path. Nothing of it remains."""
    descriptor = os.memfd_create("wan_mlperf-file")
    try:
        path = Path(f"/proc/self/fd/{descriptor}")
        path.write_bytes(content)
        yield path
    finally:
        os.close(descriptor)


def clean_up() -> None:
    """Remove everything temporary, for a process that leaves without unwinding. Safe to call from any thread."""
    for path in list(_temporary):
        _remove(path)


def clean_up_after(job: Path) -> None:
    """Remove the temporary files that killed ranks left outside the job's folder `job`."""
    for link in job.glob(f"{_NOTE}*"):
        with contextlib.suppress(OSError):
            _remove(Path(os.readlink(link)))


def adopt_job() -> None:
    """Remove the job's folder when this process leaves: its launcher is gone."""
    if job := os.environ.get(JOB):
        clean_up_after(Path(job))
        _temporary.add(Path(job))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def take_back() -> None:
    """Remove the empty folders that this process made for outputs, after its command was refused."""
    while _made:
        with contextlib.suppress(OSError):
            _made.pop().rmdir()


def reason(error: Exception) -> str:
    """Say why a file or folder cannot be used, in the system's words."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def make_folder(folder: Path) -> None:
    """Make a folder for outputs, and its parents, and note them for `take_back`. Raises OSError."""
    missing = []
    for one in (folder, *folder.parents):
        if one.exists() or one.is_symlink():
            break
        missing.append(one)
    for one in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another rank was first
            one.mkdir()
            _made.append(one)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def writable_folder(folder: Path, *, what: str) -> Path:
    """Make `folder` if it is missing and check that files can be written there. Raises BadInput."""
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise BadInput(f"{what} {str(folder)!r}: not writable ({reason(error)}); allowed: a folder you can write to") from None
    return folder


def writable_file(path: Path, *, what: str) -> Path:
    """Check, before the work, that a file can be written under this name. Raises BadInput."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not path.exists() or path.is_file():
            make_folder(path.parent)
            with contextlib.suppress(FileNotFoundError):
                path.lstat()  # raises for a name that is too long
            target = Path(os.path.realpath(path)) if path.is_symlink() else path  # as atomic_file has it
            with tempfile.TemporaryFile(dir=target.parent):
                pass
    except (OSError, ValueError) as error:
        raise BadInput(f"{what} {str(path)!r}: cannot be written ({reason(error)}); allowed: another name or folder") from None
    return path


def cache_folder() -> Path:
    """Return the cache folder: $WAN_MLPERF_CACHE, or one in the user's cache folder, or else one in the temporary folder.

    A container often has no home folder, or one that is not writable. $WAN_MLPERF_CACHE is used without these checks.
    """
    if named := os.environ.get("WAN_MLPERF_CACHE"):
        return expand(named, what="WAN_MLPERF_CACHE")
    for place in (os.environ.get("XDG_CACHE_HOME") or "", os.path.expanduser("~/.cache")):
        if os.path.isabs(place) and _could_be_made(Path(place) / "wan_mlperf"):
            return Path(place) / "wan_mlperf"
    try:
        own = Path(tempfile.gettempdir()) / f"wan_mlperf-cache-{os.getuid()}"
    except OSError as error:
        raise BadInput(
            f"cache folder: none can be written ({error.strerror}); allowed: a writable folder (WAN_MLPERF_CACHE)"
        ) from None
    if own.exists() and own.stat().st_uid != os.getuid():
        raise BadInput(f"cache folder {str(own)!r}: is another user's; allowed: a writable folder (WAN_MLPERF_CACHE)")
    return own


def keep_compiled(variables: MutableMapping[str, str]) -> None:
    """Make torch keep what it compiles in our cache. Its default is in the temporary folder, made when torch is imported."""
    with contextlib.suppress(BadInput, OSError):
        folder = cache_folder() / "inductor"
        if _could_be_made(folder):
            variables.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def _could_be_made(folder: Path) -> bool:
    there = folder
    try:
        while not there.exists():
            there = there.parent
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            return False
        if there != folder:  # root may write to /proc, where nothing can be made
            os.rmdir(tempfile.mkdtemp(prefix=TEMPORARY, dir=there))
        return True
    except OSError:
        return False
