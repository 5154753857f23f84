"""vbench/summary.json: the accuracy of one run, as one frozen, versioned record that is written and read here only.

As in `sut/result.py`: a new field has a default, and a changed or dropped one raises VERSION.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from wan_mlperf.inputs.records import read_record, write_record

VERSION = 1
FILE = "vbench/summary.json"
STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VideoScore:
    """One video's score in one dimension; `index` is its prompt's."""

    index: int
    prompt: str
    score: float


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DimensionScore:
    """One dimension: VBench's mean, how many of the benchmark's prompts count for it (`of`), and each video's score."""

    score: float
    of: int
    device: str
    seconds: float
    videos: tuple[VideoScore, ...]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VideoLists:
    """How many videos were scored, and one line for each that was not: see `videos.Videos`."""

    scored: int
    missing: tuple[str, ...]
    unreadable: tuple[str, ...]
    extra: tuple[str, ...]
    refused: tuple[str, ...]
    unnamed: tuple[str, ...]
    not_in_run: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Summary:
    """A run's accuracy. `score` is the mean of the six dimensions times 100, None unless all of them cover the whole run.

    `reached`: the score is at least `floor`. `complete`: every benchmark prompt of this run is in the score, and all six
    dimensions are. `problems`: why the score is not the benchmark's, beyond missing the floor; `valid`: none of these, and the
    floor is reached. `hash` is the SHA-256 of LoadGen's accuracy log, None without one.
    """

    version: int = VERSION
    score: float | None
    floor: float
    reached: bool | None
    complete: bool
    valid: bool
    problems: tuple[str, ...]
    dimensions: dict[str, DimensionScore]
    videos: VideoLists
    versions: dict[str, str]
    checkpoints: dict[str, str]
    hash: str | None


def write(folder: Path, summary: Summary) -> None:
    """Write a run folder's summary.json."""
    write_record(folder / FILE, summary)


def read(folder: Path) -> Summary:
    """Read a run folder's summary.json. Raises BadInput if it is missing, incomplete or of another version."""
    return read_record(folder / FILE, Summary, version=VERSION, what="what `python -m wan_mlperf.vbench` wrote")
