"""VBench's raw results -> the benchmark's score, its verdict, accuracy.txt and the summary.

The score is that of MLCommons' reference: the plain mean of VBench's results in six dimensions, times 100. VBench's own
leaderboard rescales and weights the dimensions; the benchmark does neither. A raw result counts only for the videos it was
computed from: it contains their hashes, and a changed, added or removed video makes it stale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.table import Table
from typing_extensions import TypedDict  # pydantic accepts typing's own only from Python 3.12 on

from sut import accuracy_log
from sut.result import Result
from wan_mlperf.errors import Failed
from wan_mlperf.vbench.checkpoints import not_the_published
from wan_mlperf.vbench.summary import DimensionScore, Summary, VideoLists, VideoScore
from wan_mlperf.vbench.videos import OTHER_WORKLOAD, Videos, shown
from wan_mlperf.workload import DIMENSIONS

FLOOR = 69.7752  # 99 % of the reference's 70.48
LISTS = ("missing", "unreadable", "extra", "refused", "unnamed", "not_in_run")


class RawVideo(TypedDict):
    """One video's score; `name` is its staged file name."""

    name: str
    video_results: float


class Raw(TypedDict):
    """What worker.py writes for a dimension: VBench's mean and scores, and what they were computed from."""

    dimension: str
    mean: float
    videos: list[RawVideo]
    device: str
    seconds: float
    versions: dict[str, str]
    sha256: dict[str, str]
    checkpoints: dict[str, str]


def read_raw(file: Path, expected: Mapping[str, str]) -> Raw | None:
    """Return a dimension's raw result, or None if there is none for exactly these videos: `expected` is name -> SHA-256.

    Raises Failed if VBench left out a video or a number is not finite.
    """
    try:
        raw = TypeAdapter(Raw).validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise Failed(f"{file}: cannot be read ({where}{first['msg']}); delete it and score again") from None
    except OSError as error:
        raise Failed(f"{file}: cannot be read ({error.strerror}); delete it and score again") from None
    if raw["sha256"] != dict(expected):
        return None
    got = sorted(video["name"] for video in raw["videos"])
    if got != sorted(expected):
        absent = sorted(set(expected) - set(got)) or got
        raise Failed(f"{file}: VBench scored {len(got)} of {len(expected)} videos; not {', '.join(map(shown, absent[:3]))}")
    if not all(math.isfinite(value) for value in [raw["mean"], *(video["video_results"] for video in raw["videos"])]):
        raise Failed(f"{file}: holds a score that is not a finite number")
    return raw


def summarise(
    folder: Path,
    videos: Videos,
    prompts: Mapping[str, Sequence[str]],
    raws: Mapping[str, Raw],
    run: Result | None = None,
    more: Sequence[str] = (),
) -> Summary:
    """Judge the raw results of the scored dimensions. `run` is the result of the run that made the videos, if known.

    `more` are problems that are already known.
    """
    absent = [dimension for dimension in DIMENSIONS if dimension not in raws]
    complete = not (absent or videos.missing or videos.unreadable)
    score = 100 * sum(raws[dimension]["mean"] for dimension in DIMENSIONS) / len(DIMENSIONS) if complete else None
    problems = [*_problems(videos, prompts, raws, absent, run), *more]
    lists = {name: tuple(getattr(videos, name)) for name in LISTS}
    checkpoints: dict[str, str] = {}
    for raw in raws.values():
        checkpoints.update(raw["checkpoints"])
    return Summary(
        score=score,
        floor=FLOOR,
        reached=None if score is None else score >= FLOOR,
        complete=complete,
        valid=score is not None and score >= FLOOR and not problems,
        problems=tuple(problems),
        dimensions={name: _dimension(raws[name], videos, prompts, name) for name in DIMENSIONS if name in raws},
        videos=VideoLists(scored=len(videos.scored), **lists),
        versions=next((raw["versions"] for raw in raws.values()), {}),
        checkpoints=checkpoints,
        hash=accuracy_log.whole_sha256(folder),
    )


def _problems(
    videos: Videos,
    prompts: Mapping[str, Sequence[str]],
    raws: Mapping[str, Raw],
    absent: Sequence[str],
    run: Result | None,
) -> list[str]:
    answered = len(prompts) - len(videos.not_in_run)
    kinds = (
        (videos.missing, "videos are missing"),
        (videos.unreadable, "videos are unreadable"),
        (videos.refused, "prompts cannot be a file's name"),
        (videos.extra, "prompts are not the benchmark's"),
        (absent, f"dimensions are not scored: {', '.join(absent)}"),
    )
    found = [f"{len(lines)} {what}" for lines, what in kinds if lines]
    if videos.not_in_run:
        found.append(f"the run has {answered} of the benchmark's {len(prompts)} prompts")
    same: dict[str, list[object]] = {
        "versions": [raw["versions"] for raw in raws.values()],
        "checkpoints": [raw["checkpoints"] for raw in raws.values()],
        "devices": [raw["device"] for raw in raws.values()],
    }
    found += [f"the dimensions were scored with different {what}" for what, values in same.items() if _conflict(values)]
    foreign = {path for raw in raws.values() for path in not_the_published(raw["checkpoints"])}
    found += [f"{path} is not the publisher's file" for path in sorted(foreign)]
    if run is not None and not run.workload_is_mlperf:
        found.append(OTHER_WORKLOAD)
    return found


def _conflict(values: Sequence[Any]) -> bool:
    """True if any two of these differ. Mappings may have different keys, but not different values for the same key."""
    if not values or not isinstance(values[0], Mapping):
        return len(set(values)) > 1
    merged: dict[str, object] = {}
    return any(merged.setdefault(key, item) != item for value in values for key, item in value.items())


def _dimension(raw: Raw, videos: Videos, prompts: Mapping[str, Sequence[str]], name: str) -> DimensionScore:
    per_video = []
    for one in raw["videos"]:
        video = videos.scored[one["name"]]
        per_video.append(VideoScore(index=video.index, prompt=video.prompt, score=float(one["video_results"])))
    return DimensionScore(
        score=raw["mean"],
        of=sum(name in dimensions for dimensions in prompts.values()),
        device=raw["device"],
        seconds=raw["seconds"],
        videos=tuple(sorted(per_video, key=lambda one: one.index)),
    )


def accuracy_text(summary: Summary) -> str | None:
    """Return accuracy.txt as MLCommons' checker reads it, or None without a score of the whole run.

    Above the line that counts are notes that say why the score is not the benchmark's, and the score of each dimension, as
    MLCommons' reference prints them. The hash is that of the whole accuracy log; without that log there is no hash line.
    """
    if summary.score is None:
        return None
    lines = [f"note: {problem}" for problem in summary.problems]
    lines += [f"  {name:30s}: {one.score:6.4f}" for name, one in sorted(summary.dimensions.items())]
    lines.append(f"{{'vbench_score': {max(0.0, summary.score):.10f}}}")
    if summary.hash:
        lines.append(f"hash={summary.hash}")
    return "\n".join(lines) + "\n"


def verdict(summary: Summary) -> str:
    """Say in one line whether the score reaches the floor, and whether it counts."""
    if summary.score is None:
        return f"INCOMPLETE, no score: {'; '.join(summary.problems)}"
    compared = f"{summary.score:.4f} {'>=' if summary.reached else '<'} {FLOOR}"
    word = "VALID" if summary.valid else "INVALID"
    return f"{word}: {compared}{''.join(f'; {problem}' for problem in summary.problems)}"


def as_table(summary: Summary) -> Table:
    """Return a table of the scores per dimension and their mean."""
    table = Table(title="VBench")
    table.add_column("dimension")
    for title in ("videos", "score", "lowest", "highest", "seconds"):
        table.add_column(title, justify="right")
    for name in DIMENSIONS:
        one = summary.dimensions.get(name)
        if one is None:
            table.add_row(name, "-", "not scored", "-", "-", "-")
            continue
        scores = [video.score for video in one.videos]
        counted = f"{len(scores)} of {one.of}"
        table.add_row(name, counted, f"{one.score:.4f}", f"{min(scores):.4f}", f"{max(scores):.4f}", f"{one.seconds:.0f}")
    table.add_section()
    score = summary.score
    table.add_row("mean x 100", str(summary.videos.scored), "none" if score is None else f"{score:.4f}", "", "", "")
    return table
