"""manifest.json: which videos of a folder are whole, and what made them. `generate --prompts` and `serve` write the same format.

Its sections: `recipes` (key -> everything that decides how a video looks), `videos` (file name -> `Entry`) and, for a server,
`jobs` (what clients may ask about each job, finished or not).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from wan_mlperf.checkpoint import Checkpoint
from wan_mlperf.errors import BadInput
from wan_mlperf.recipe import Recipe
from wan_mlperf.workload import Workload

MANIFEST = "manifest.json"
# Settings that change at most a video's rounding. A list of prompts may be continued with other values of these.
NOT_IN_A_VIDEO = ("name", "folder", "mesh", "offline", "faults", "warmup_queries", "user_conf", "workload")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A video in the manifest; `recipe` is a key of the section `recipes`."""

    prompt: str
    seed: int
    recipe: str
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a manifest."""

    recipes: dict[str, dict[str, object]] = dataclasses.field(default_factory=dict)
    videos: dict[str, Entry] = dataclasses.field(default_factory=dict)
    jobs: dict[str, dict[str, object]] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, file: Path, *, force: bool = False, allowed: str = "another folder") -> Manifest:
        """Read a manifest; an empty one if there is no file.

        Raises BadInput if it is not a manifest, unless `force` is set; `allowed` is what the caller's user can do then.
        """
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            json.dumps(values, ensure_ascii=False, allow_nan=False).encode()  # escapes can hide NaN and lone surrogates
            found = cls(
                recipes=values["recipes"],
                videos={name: Entry(**entry) for name, entry in values["videos"].items()},
                jobs=values.get("jobs", {}),
            )
            sound = all(isinstance(one, dict) for one in [*found.recipes.values(), *found.jobs.values()]) and all(
                isinstance(one.seed, int) and all(isinstance(text, str) for text in (one.prompt, one.recipe, one.sha256))
                for one in found.videos.values()
            )
            if not sound:
                raise ValueError("a value of the wrong type")
            return found
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if force:
                return cls()
            reason = (
                error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
            )
            raise BadInput(f"manifest {str(file)!r}: cannot be used ({reason}); allowed: {allowed}") from None

    def text(self) -> str:
        """Return the file's content."""
        return written(
            recipes=(line(key, recipe) for key, recipe in self.recipes.items()),
            videos=(line(name, dataclasses.asdict(entry)) for name, entry in self.videos.items()),
            jobs=(line(name, job) for name, job in self.jobs.items()),
        )


def line(name: str, value: Mapping[str, object]) -> str:
    """Return one item of a section."""
    return f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}"


def written(**sections: Iterable[str]) -> str:
    """Return a manifest's content from the lines of its sections."""
    parts = (f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}" for name, lines in sections.items())
    return "{\n" + ",\n".join(parts) + "\n}\n"


def identity(recipe: Recipe, workload: Workload, checkpoint: Checkpoint) -> dict[str, object]:
    """Return everything that decides how a video looks, apart from prompt and seed, as "key.path" -> value."""
    values = dataclasses.asdict(recipe)
    for name in NOT_IN_A_VIDEO:
        values.pop(name)
    values["model"].pop("checkpoint")  # the folder may move: its weights identify it
    values |= {"workload": dataclasses.asdict(workload), "weights": checkpoint.identity}
    return json.loads(json.dumps(_flat(values)))


def key_of(recipe: Mapping[str, object]) -> str:
    """Return the key that an identity has in `recipes`."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
