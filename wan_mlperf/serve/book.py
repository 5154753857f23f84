"""All video jobs of this server, in memory and in its folder, where a restarted server finds them again.

A job is written to the manifest before it starts, and its video appears under its final name only when it is whole. File names
are made here and never taken from a request.
"""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from wan_mlperf import process
from wan_mlperf.errors import BadInput
from wan_mlperf.files import TEMPORARY, atomic_write
from wan_mlperf.inputs import locks
from wan_mlperf.videos.manifest import MANIFEST, Entry, Manifest, line, written

Status = Literal["queued", "in_progress", "completed", "failed"]
LOCK_S = 10.0  # the ranks of a killed server hold the lock a little longer
PAUSE_S, SHARE = 0.02, 10  # the pause after writing a manifest: this, plus ten times the time it took
LOST = "the server ended before this video was finished"


@checked_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Video:
    """A video job. `number` orders the jobs; `size` is width x height, `seconds` OpenAI's length; times are Unix times.

    `recipe` is the manifest's key for everything that decides how the video looks; `error` is (code, message).
    """

    id: Annotated[str, Field(pattern="^video_[0-9a-f]{32}$")]  # part of a file name, so a damaged manifest must not choose it
    number: int
    route: str
    prompt: str
    seed: int
    negative_prompt: str | None
    size: str
    seconds: str
    recipe: str
    created_at: float
    status: Status = "queued"
    completed_at: float | None = None
    error: tuple[str, str] | None = None
    sha256: str | None = None

    @property
    def file(self) -> str:
        """The file name of its MP4."""
        return f"{self.id}.mp4"

    @property
    def is_over(self) -> bool:
        """True once the job has completed or failed."""
        return self.status in ("completed", "failed")


_READ = TypeAdapter(Video)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the folder held at the start: the number of finished videos, and the ids of jobs that were lost."""

    finished: int
    lost: tuple[str, ...]


class Book:
    """All jobs. Safe to use from any thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._videos: dict[str, Video] = {}
        self._lines: dict[str, tuple[str | None, str]] = {}  # each job's two lines in the manifest: its video's and its own
        self._others: list[str] = []  # the manifest's lines of videos that are not a job's, such as those of `generate --prompts`
        self._recipes: dict[str, str] = {}
        self._lock = threading.Condition()
        self._last = 0  # number of the newest job
        self._version = self._on_disk = 0
        self._closing = False
        self._writer: threading.Thread | None = None
        self._folder_lock: int | None = None
        self.found = Found(finished=0, lost=())

    def open(self) -> None:
        """Lock the folder for this server and read its jobs.

        Raises BadInput if another server has it, or if its manifest cannot be used.
        """
        self._folder_lock = locks.lock(self.folder, what="--folder", busy="another server writes there", wait_s=LOCK_S)
        manifest = Manifest.read(self.folder / MANIFEST)
        for leftover in self.folder.glob(f"{TEMPORARY}*"):
            leftover.unlink(missing_ok=True)
        finished, lost = 0, []
        try:
            videos = [_READ.validate_python({**job, "id": name}) for name, job in manifest.jobs.items()]
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            what = ".".join(map(str, first["loc"]))
            problem = f"jobs: {what}: {first['msg']}"
            raise BadInput(
                f"manifest {str(self.folder / MANIFEST)!r}: cannot be used ({problem}); allowed: another folder"
            ) from None
        for video in videos:
            there = (self.folder / video.file).is_file()
            if there and video.status != "completed":  # finished, but the server ended before it wrote the manifest
                content = (self.folder / video.file).read_bytes()
                video = replace(video, status="completed", error=None, sha256=hashlib.sha256(content).hexdigest())
                video = replace(video, completed_at=(self.folder / video.file).stat().st_mtime)
            elif not there and video.status == "completed":
                continue  # the user has deleted the file
            elif not video.is_over:
                video = replace(video, status="failed", error=("lost", LOST), completed_at=time.time())
                lost.append(video.id)
            finished += video.status == "completed"
            self._put(video)
        of_jobs = {video.file for video in videos}
        self._others = [line(name, asdict(entry)) for name, entry in manifest.videos.items() if name not in of_jobs]
        self._recipes = {key: line(key, recipe) for key, recipe in manifest.recipes.items()}
        self._writer = threading.Thread(target=self._write_on, name="manifest", daemon=True)
        self._writer.start()
        self.found = Found(finished=finished, lost=tuple(lost))

    def add(self, *, recipe: tuple[str, Mapping[str, object]], **values: Any) -> Video:
        """Add a job and return it; `recipe` is its key and the identity it stands for, `values` are `Video`'s other fields."""
        with self._lock:
            key, identity = recipe
            if key not in self._recipes:
                self._recipes[key] = line(key, identity)
            number = self._last + 1
            video = Video(id=f"video_{uuid.uuid4().hex}", number=number, recipe=key, created_at=time.time(), **values)
            self._put(video)
            return video

    def change(self, video_id: str, **changes: Any) -> Video | None:
        """Change fields of a job and return the new job; None if it was deleted."""
        with self._lock:
            video = self._videos.get(video_id)
            if video is None:
                return None
            video = replace(video, **changes)
            self._put(video)
            return video

    def complete(self, video_id: str, content: bytes) -> Video | None:
        """Store the MP4 of a job and mark it completed; None if it was deleted. Raises OSError."""
        video = self.get(video_id)
        if video is None:
            return None
        atomic_write(self.folder / video.file, content)
        sha256 = hashlib.sha256(content).hexdigest()
        completed = self.change(video_id, status="completed", completed_at=time.time(), sha256=sha256)
        if completed is None:  # deleted just now
            self.path(video).unlink(missing_ok=True)
        return completed

    def fail(self, video_id: str, code: str, message: str) -> Video | None:
        """Mark a job as failed, with the reason."""
        return self.change(video_id, status="failed", completed_at=time.time(), error=(code, message))

    def remove(self, video_id: str) -> None:
        """Delete a job and its MP4. Raises OSError, and keeps the job, if the file cannot be deleted."""
        with self._lock:
            video = self._videos.get(video_id)
            if video is None:
                return
            self.path(video).unlink(missing_ok=True)
            del self._videos[video_id], self._lines[video_id]
            self._touch()

    def get(self, video_id: str) -> Video | None:
        """Return the job with this id."""
        return self._videos.get(video_id)

    def path(self, video: Video) -> Path:
        """Return where a job's MP4 is, or will be."""
        return self.folder / video.file

    def page(self, *, after: str | None, limit: int, newest_first: bool) -> tuple[list[Video], bool]:
        """Return up to `limit` jobs after the job `after`, and whether there are more. Raises KeyError if `after` is unknown."""
        with self._lock:
            videos = list(self._videos.values())
            begin = self._videos[after].number if after is not None else None
        ordered: Iterator[Video] = reversed(videos) if newest_first else iter(videos)
        found: list[Video] = []
        for video in ordered:
            if begin is None or (video.number < begin if newest_first else video.number > begin):
                if len(found) == limit:
                    return found, True
                found.append(video)
        return found, False

    def flush(self, timeout_s: float = 30.0) -> None:
        """Wait until all earlier changes are on disk."""
        with self._lock:
            wanted = self._version
            self._lock.wait_for(lambda: self._on_disk >= wanted, timeout_s)

    def close(self) -> None:
        """Write the remaining changes and unlock the folder."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if self._writer is not None:
            self._writer.join(30)
            locks.unlock(self.folder, self._folder_lock)

    def _put(self, video: Video) -> None:
        with self._lock:
            self._last = max(self._last, video.number)
            self._videos[video.id] = video
            job = {name: value for name, value in asdict(video).items() if name != "id"}
            of_video = None
            if video.status == "completed":
                entry = {field.name: getattr(video, field.name) for field in fields(Entry)}
                of_video = line(video.file, entry)
            self._lines[video.id] = of_video, line(video.id, job)
            self._touch()

    def _touch(self) -> None:
        self._version += 1
        self._lock.notify_all()

    def _write_on(self) -> None:
        """Thread: write the manifest whenever something has changed, with all changes since the last time."""
        said = ""
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._version > self._on_disk or self._closing)
                if self._version == self._on_disk:
                    return
                version, lines, recipes = self._version, list(self._lines.values()), list(self._recipes.values())
            begin = time.perf_counter()
            try:
                videos = [*self._others, *(one for one, _ in lines if one)]
                text = written(recipes=recipes, videos=videos, jobs=[job for _, job in lines])
                atomic_write(self.folder / MANIFEST, text)
            except OSError as error:  # e.g. a full disk: try again
                if said != (said := f"{MANIFEST} cannot be written: {process.one_line(error)}"):
                    process.say(said)
                if self._closing:
                    return
                time.sleep(1.0)
                continue
            with self._lock:
                self._on_disk = version
                self._lock.notify_all()
            if not self._closing:
                time.sleep(PAUSE_S + SHARE * (time.perf_counter() - begin))
