"""Which videos VBench scores: reads a run's videos and prompts, checks each, and links them under the names VBench expects.

Nothing is dropped silently: each video and each prompt ends up in exactly one of the lists of `Videos`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import av

from wan_mlperf.errors import BadInput
from wan_mlperf.videos.manifest import MANIFEST, Manifest
from wan_mlperf.workload import DIMENSIONS, MLPERF

FORMAT = 'allowed: a list of {"index": 0, "prompt": "...", "video": "videos/0.mp4"}, each index, prompt and video once'
LONGEST_NAME = 255  # bytes of a file name on every common file system
OTHER_WORKLOAD = "the videos are of another workload than the benchmark's"
FEWEST_FRAMES = 3  # motion_smoothness interpolates between every second frame


@dataclass(frozen=True, kw_only=True)
class Video:
    """One prompt of a run and its video's file, relative to the run folder."""

    index: int
    prompt: str
    video: str

    @property
    def name(self) -> str:
        """The file name that VBench expects for this prompt's first video."""
        return f"{self.prompt}-0.mp4"


@dataclass(kw_only=True)
class Videos:
    """A run's videos and prompts, sorted. `scored` and `sha256` are keyed by staged name.

    The others hold one line each. `missing` and `unreadable` are videos of benchmark prompts. `extra` and `refused` are prompts
    that are not the benchmark's; the latter cannot even be part of a file name. `unnamed` are files that prompts.json does not
    name, and `not_in_run` are benchmark prompts that the run lacks.
    """

    scored: dict[str, Video] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)
    not_in_run: list[str] = field(default_factory=list)

    def of(self, dimension: str, prompts: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """Return staged name -> SHA-256 of the videos that count in a dimension."""
        return {name: self.sha256[name] for name, video in self.scored.items() if dimension in prompts[video.prompt]}


def dimensions_by_prompt(full_info: Path) -> dict[str, tuple[str, ...]]:
    """Return each prompt of the six dimensions, with the dimensions it counts in, from VBench_full_info.json."""
    found: dict[str, tuple[str, ...]] = {}
    for entry in json.loads(full_info.read_text(encoding="utf-8")):
        wanted = tuple(one for one in DIMENSIONS if one in entry["dimension"])
        if wanted:
            found[entry["prompt_en"]] = found.get(entry["prompt_en"], ()) + wanted
    return found


def read_run(folder: Path) -> list[Video]:
    """Return the videos that a folder should contain.

    They are those in prompts.json (an accuracy run), in manifest.json (`generate --prompts`, `serve`), or else `<prompt>-0.mp4`
    files, VBench's names. Raises BadInput for a folder without any, for a file in another format, and for a prompt twice.
    """
    file = folder / "prompts.json"
    if not file.is_file() and (folder / MANIFEST).is_file():
        file = folder / MANIFEST
        return _once(file, [_entry(one, number, file) for number, one in enumerate(_of_manifest(folder))])
    if not file.is_file():
        named = sorted(path for path in video_files(folder) if path.name.endswith("-0.mp4"))
        if not named:
            raise BadInput(
                f"{str(folder)!r}: no prompts.json, no {MANIFEST}, no <prompt>-0.mp4; "
                "allowed: the folder of an accuracy run or of `generate --prompts`"
            )
        return [
            Video(index=index, prompt=path.name.removesuffix("-0.mp4"), video=path.relative_to(folder).as_posix())
            for index, path in enumerate(named)
        ]
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{str(file)!r}: cannot be read ({error}); {FORMAT}") from None
    if not isinstance(entries, list) or not entries:
        raise BadInput(f"{str(file)!r}: not a list of videos; {FORMAT}")
    return _once(file, [_entry(one, number, file) for number, one in enumerate(entries)])


def _of_manifest(folder: Path) -> list[dict[str, Any]]:
    """The videos of a manifest in the form of prompts.json, in the order of their numbers."""
    try:
        videos = Manifest.read(folder / MANIFEST).videos
    except BadInput as error:
        raise BadInput(f"{str(error).partition('; allowed')[0]}; allowed: one that `generate --prompts` wrote") from None
    if not videos:
        raise BadInput(f"{str(folder / MANIFEST)!r}: names no video; allowed: after `generate --prompts`")
    names = sorted(videos, key=lambda name: (len(name), name))  # 0.mp4 ... 10.mp4
    return [{"index": index, "prompt": videos[name].prompt, "video": name} for index, name in enumerate(names)]


def manifest_problems(folder: Path) -> list[str]:
    """Say what keeps a score of a manifest's videos from being the benchmark's. Empty for a folder of another kind."""
    if (folder / "prompts.json").is_file() or not (folder / MANIFEST).is_file():
        return []
    manifest = Manifest.read(folder / MANIFEST)
    used = {one.recipe for one in manifest.videos.values()}
    wanted = {f"workload.{key}": value for key, value in dataclasses.asdict(MLPERF).items()}
    others = [key for key in used if not wanted.items() <= manifest.recipes.get(key, {}).items()]
    found = [OTHER_WORKLOAD] if others else []
    return found + ([f"the videos were made in {len(used)} different ways ({MANIFEST})"] if len(used) > 1 else [])


def _once(file: Path, videos: list[Video]) -> list[Video]:
    for key in ("index", "prompt", "video"):
        seen: dict[object, int] = {}
        for video in videos:
            value = getattr(video, key)
            if value in seen:
                where = f"index {seen[value]} and {video.index}"
                raise BadInput(f"{str(file)!r}: {key} {value!r} is given twice, at {where}; {FORMAT}")
            seen[value] = video.index
    return videos


def _entry(one: object, number: int, file: Path) -> Video:
    kinds = {"index": int, "prompt": str, "video": str}
    if not isinstance(one, dict) or any(type(one.get(key)) is not kind for key, kind in kinds.items()):
        raise BadInput(f"{str(file)!r}: entry {number} is {one!r}; {FORMAT}")
    path = PurePosixPath(one["video"])
    fits = one["video"].isprintable() and len(one["video"]) <= LONGEST_NAME and path.suffix == ".mp4"
    if not fits or path.is_absolute() or ".." in path.parts:
        raise BadInput(f"{str(file)!r}: entry {number} names the video {one['video']!r}; allowed: an .mp4 inside the folder")
    return Video(index=one["index"], prompt=one["prompt"], video=one["video"])


def video_files(folder: Path) -> list[Path]:
    """Return every MP4 of a run: those in `videos`, or else those in the folder itself."""
    inside = folder / "videos"
    return sorted((inside if inside.is_dir() else folder).glob("*.mp4"))


def why_no_file_name(prompt: str) -> str | None:
    """Return why a prompt cannot be part of a file name, or None. A name that passes cannot point outside its folder."""
    if "/" in prompt or "\\" in prompt:
        return "it holds a path separator"
    if not prompt or not prompt.isprintable():
        return "it is empty or holds a control character"
    if prompt in (".", ".."):
        return "it is a folder's name"
    try:
        size = len(f"{prompt}-0.mp4".encode())
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    return f"it is too long for a file name ({size} bytes)" if size > LONGEST_NAME else None


def sort_out(
    folder: Path,
    run: Sequence[Video],
    prompts: Mapping[str, Sequence[str]],
    *,
    checked: Callable[[], None] = lambda: None,
) -> Videos:
    """Check every video of a run: is its prompt the benchmark's, and can it be decoded? `checked` is called after each one."""
    result = Videos()
    for video in run:
        path = folder / video.video
        label = f"{video.video}: prompt {shown(video.prompt)}"
        reason = why_no_file_name(video.prompt)
        if reason:
            result.refused.append(f"{label} is not used, {reason}")
        elif video.prompt not in prompts:
            result.extra.append(f"{label} is not one of the benchmark's")
        elif not path.is_file():
            result.missing.append(f"{label} has no video")
        elif problem := unreadable(path):
            result.unreadable.append(f"{label}: {problem}")
        else:
            result.scored[video.name] = video
            result.sha256[video.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        checked()
    named = {(folder / video.video).resolve() for video in run}
    result.unnamed = [str(path.relative_to(folder)) for path in video_files(folder) if path.resolve() not in named]
    answered = {video.prompt for video in run}
    result.not_in_run = [prompt for prompt in prompts if prompt not in answered]
    return result


def unreadable(path: Path) -> str | None:
    """Decode a whole MP4. Returns what is wrong with it, or None."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            declared = stream.frames
            frames = sum(1 for _ in container.decode(stream))
    except (OSError, ValueError, IndexError, av.FFmpegError) as error:
        return f"cannot be decoded ({getattr(error, 'strerror', None) or error})"
    if declared and frames != declared:
        return f"holds {frames} of the {declared} frames that it declares"
    return f"holds {frames} frames, scoring needs {FEWEST_FRAMES}" if frames < FEWEST_FRAMES else None


def stage(folder: Path, videos: Videos, target: Path) -> None:
    """Empty `target`, and link every scored video there under VBench's name for it."""
    if target.is_symlink():
        target.unlink()
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name, video in videos.scored.items():
        link = target / name
        assert link.parent == target and link.name == name, name
        link.symlink_to((folder / video.video).resolve())


def shown(prompt: str, longest: int = 80) -> str:
    """Return a prompt for printing: one line, without control characters, and not too long."""
    text = ascii(prompt) if not prompt.isprintable() else repr(prompt)
    return text if len(text) <= longest else f"{text[:longest]}..."
