"""The folder of `generate --prompts`: which videos are complete, and what made them.

Videos are named by the prompt's number, never by the prompt. `manifest.json` names every video before it appears, so a file that
it does not name belongs to somebody else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from wan_mlperf import process
from wan_mlperf.errors import BadInput
from wan_mlperf.files import TEMPORARY, atomic_write
from wan_mlperf.inputs import locks
from wan_mlperf.videos.manifest import MANIFEST, Entry, Manifest, key_of

LOCK_S = 10.0  # the ranks of a killed run keep the folder locked for a moment


class VideoList:
    """The videos of `prompts` in `folder`. Writing needs `lock`. If not `locked`, a file system without locks is accepted."""

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[str],
        *,
        seed: int,
        recipe: dict[str, object],
        force: bool = False,
        locked: bool = True,
    ) -> None:
        self.folder = folder
        self._prompts = prompts
        self._seed = seed
        self._force = force
        self._locked = locked
        self._key = key_of(recipe)
        self._recipe = recipe
        self._read()

    def missing(self) -> list[int]:
        """Return the numbers of the prompts without a complete video. Raises BadInput rather than mix or replace videos."""
        return [number for number in range(len(self._prompts)) if not self._is_there(number)]

    def lock(self) -> None:
        """Keep other runs out until `unlock`, and remove what a killed run left unfinished. Raises BadInput."""
        without = None if self._locked else process.note
        self._lock = locks.lock(self.folder, what="--output", wait_s=LOCK_S, without=without)
        self._read()
        names = (MANIFEST, *(video_name(number) for number in range(len(self._prompts))))
        for pattern in (f"{TEMPORARY}*", *(f".{name}.*" for name in names)):  # earlier versions left the latter
            for leftover in self.folder.glob(pattern):
                leftover.unlink(missing_ok=True)

    def unlock(self) -> None:
        """Let other runs in. The end of the process does the same."""
        locks.unlock(self.folder, self._lock)

    def add(self, number: int, content: bytes) -> None:
        """Keep a video: first the manifest's entry, then the file."""
        entry = Entry(prompt=self._prompts[number], seed=self._seed, recipe=self._key, sha256=hashlib.sha256(content).hexdigest())
        self._entries[video_name(number)] = entry
        used = {one.recipe for one in self._entries.values()} | {job.get("recipe") for job in self._jobs.values()}
        recipes = {key: recipe for key, recipe in self._recipes.items() if key in used}
        manifest = Manifest(recipes=recipes, videos=self._entries, jobs=self._jobs)
        atomic_write(self.folder / MANIFEST, manifest.text())
        atomic_write(self.folder / video_name(number), content)

    def _read(self) -> None:
        manifest = Manifest.read(self.folder / MANIFEST, force=self._force, allowed="another folder, or --force")
        self._recipes, self._entries, self._jobs = manifest.recipes, manifest.videos, manifest.jobs
        self._recipes[self._key] = self._recipe

    def _is_there(self, number: int) -> bool:
        name = video_name(number)
        file, entry = self.folder / name, self._entries.get(name)
        if entry is None:
            if file.exists() and not self._force:
                raise BadInput(
                    f"--output: {str(file)!r} exists and {MANIFEST} does not name it; allowed: another folder, or --force"
                )
            return False
        difference = self._difference(number, entry)
        if difference and not self._force:
            raise BadInput(
                f"--output: {str(file)!r} was made with {difference}; allowed: another folder, or --force to remake it"
            )
        return not difference and file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == entry.sha256

    def _difference(self, number: int, entry: Entry) -> str:
        if entry.prompt != self._prompts[number]:
            return f"prompt {entry.prompt[:60]!r}, now {self._prompts[number][:60]!r}"
        if entry.seed != self._seed:
            return f"seed {entry.seed}, now {self._seed}"
        if entry.recipe == self._key:
            return ""
        old, new = self._recipes.get(entry.recipe, {}), self._recipes[self._key]
        for key in [*new, *old]:
            if old.get(key) != new.get(key):
                return f"{key} {str(old.get(key))[:60]!r}, now {str(new.get(key))[:60]!r}"
        return "another recipe"


def video_name(number: int) -> str:
    """Return the file name of a prompt's video."""
    return f"{number}.mp4"
