"""A campaign -> the tree that MLCommons' checker takes (v6.1). The campaign is only read; the tree appears when it is whole."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sut import accuracy_log, loadgen
from sut.compliance import VERDICT
from sut.result import Scenario
from wan_mlperf.errors import BadInput, Failed
from wan_mlperf.files import atomic_write
from wan_mlperf.submit import documents, system_description
from wan_mlperf.submit.campaign import Campaign, Stage, State

SOURCE = Path(__file__).resolve().parents[2]
LOGS = ("mlperf_log_summary.txt", "mlperf_log_detail.txt")
AUDIT_VIDEOS = (130, 106, 84, 59, 12, 123, 43, 22, 238, 32)  # of round v6.1
NO_SCORE = "no VBench score: this tree is from a dry run and is not to be submitted"


def pack(
    folder: Path, *, submitter: str, division: str, system: Path, output: Path, dry_run: bool, source: Path = SOURCE
) -> list[str]:
    """Build the tree in `output`; return what a person should know of it. `source` is the git checkout that made the results.

    Raises BadInput, which names every reason, for a campaign that cannot be submitted.
    """
    for what, name in (("--submitter", submitter), ("--system", system.stem)):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}", name):
            raise BadInput(f"{what} {name!r} is a folder's name in the tree; allowed: letters, digits, '.', '_' and '-'")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise BadInput(f"-o {str(output)!r} is there and not empty; allowed: a folder that is not there yet")
    campaign = Campaign.load(folder, commit=clean_commit(source))
    states = {stage: campaign.state(stage) for stage in campaign.stages()}
    problems = _problems(campaign, states, division, dry_run)
    if problems:
        raise BadInput(f"campaign {str(folder)!r} cannot be packed: {'; '.join(problems)}")
    person = system_description.read(system)
    measured = next(state.result.system for state in states.values() if state.result and state.result.system)
    description = system_description.complete(person, measured, division=division, submitter=submitter)
    notes = _fill(description, system, dry_run)

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as name:
        tree = Path(name) / "tree"
        root = tree / division / submitter
        for scenario in campaign.recipes:
            place = root / "results" / system.stem / loadgen.MODEL / loadgen.SCENARIOS[scenario]
            notes += _scenario(place, scenario, campaign, states)
        _write(root / "systems" / f"{system.stem}.json", json.dumps(description, indent=2, ensure_ascii=False) + "\n")
        _write(root / "documentation" / "calibration.md", _calibration(campaign, states))
        _archive(source, campaign.commit, root / "src")
        if output.exists():
            output.rmdir()
        tree.rename(output)
    return notes


def clean_commit(source: Path) -> str:
    """Return the commit of a checkout without changes. Raises BadInput for a dirty tree or what is no checkout."""
    if changed := _git(source, "status", "--porcelain"):
        lines = changed.splitlines()
        raise BadInput(
            f"the source tree is dirty, {len(lines)} files such as {lines[0][3:]!r}; allowed: a commit without changes"
        )
    return _git(source, "rev-parse", "HEAD").strip()


def _git(source: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=source, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise BadInput(
            f"source {str(source)!r}: git does not answer ({' '.join(str(reason).split())}); allowed: a checkout"
        ) from None
    return done.stdout


def _problems(campaign: Campaign, states: Mapping[Stage, State], division: str, dry_run: bool) -> list[str]:
    """Everything that keeps a campaign from being submitted."""
    problems = [f"{stage}: {state.note}" for stage, state in states.items() if not state.done]
    if campaign.dry_run and not dry_run:
        problems.append("it is a dry run's")
    if dry_run and division == "closed":
        problems.append("a dry run is packed in the open division only")
    if division == "closed" and set(campaign.recipes) != set(loadgen.SCENARIOS):
        problems.append("the closed division asks for both scenarios")
    for stage, state in states.items():
        if not state.done:
            continue
        if state.vbench is not None and division == "closed" and not state.vbench.valid:
            problems.append(f"{stage}: {'; '.join([state.note, *state.vbench.problems])}")
        if state.result is None or dry_run:
            continue
        if not state.result.workload_is_mlperf:
            problems.append(f"{stage}: its workload is not the benchmark's")
        elif not state.result.prompts_are_mlperf:
            problems.append(f"{stage}: its prompts are not the benchmark's")
    return problems


def _fill(description: dict[str, Any], system: Path, dry_run: bool) -> list[str]:
    """Refuse fields that a person must fill; in a dry run mark them and say which."""
    empty = system_description.unfilled(description)
    if not empty:
        return []
    if not dry_run:
        raise BadInput(f"system {system.name}: to be filled in: {', '.join(empty)}; allowed: none of these empty")
    description.update(dict.fromkeys(empty, system_description.UNKNOWN))
    return [f"{system.name}: to be filled in: {', '.join(empty)}"]


def _scenario(place: Path, scenario: Scenario, campaign: Campaign, states: Mapping[Stage, State]) -> list[str]:
    """Write the results of one scenario."""
    runs = {kind: states[Stage(scenario=scenario, kind=kind)] for kind in ("performance", "accuracy", "vbench", "test04")}
    performance, accuracy, test04 = (runs[kind].run for kind in ("performance", "accuracy", "test04"))
    assert performance and accuracy and test04 and runs["performance"].result
    _logs(performance, place / "performance" / "run_1")
    _logs(test04, place / "TEST04" / "performance" / "run_1")
    shutil.copyfile(test04 / VERDICT, place / "TEST04" / VERDICT)
    notes = _accuracy(place / "accuracy", accuracy, scored=runs["vbench"].vbench is not None)
    shutil.copyfile(performance / "user.conf", place / "user.conf")
    recipe = yaml.safe_load(campaign.recipes[scenario])
    _write(place / "measurements.json", json.dumps(documents.measurements(recipe, runs["performance"].result), indent=2) + "\n")
    notes_of_runs = {kind: state.note for kind, state in runs.items()}
    _write(place / "README.md", documents.readme(scenario, recipe, runs["performance"].result, notes_of_runs))
    return [f"{scenario}: {note}" for note in notes]


def _calibration(campaign: Campaign, states: Mapping[Stage, State]) -> str:
    recipes, results = {}, {}
    for scenario, text in campaign.recipes.items():
        name, state = loadgen.SCENARIOS[scenario], states[Stage(scenario=scenario, kind="performance")]
        assert state.result
        recipes[name], results[name] = yaml.safe_load(text), state.result
    return documents.calibration(recipes, results)


def _logs(run: Path, place: Path) -> None:
    place.mkdir(parents=True)
    for name in LOGS:
        shutil.copyfile(run / name, place / name)


def _accuracy(place: Path, run: Path, *, scored: bool) -> list[str]:
    """Write the accuracy folder: logs, the truncated accuracy log with the hash of the whole, the score, the audit videos."""
    _logs(run, place)
    digest = accuracy_log.submitted(run, place / accuracy_log.NAME)
    hash_line = f"hash={digest}"
    lines = [NO_SCORE]
    if scored:
        lines = (run / "accuracy.txt").read_text(encoding="utf-8").splitlines()
        stated = [line for line in lines if line.startswith("hash=")]
        if stated and stated != [hash_line]:
            raise Failed(f"{run / 'accuracy.txt'}: {stated[0]} is not that of {accuracy_log.NAME}, {digest}: score the run again")
        lines = [line for line in lines if not line.startswith("hash=")]
    _write(place / "accuracy.txt", "\n".join([*lines, hash_line]) + "\n")
    entries = {entry["index"]: entry for entry in json.loads((run / "prompts.json").read_text(encoding="utf-8"))}
    captions = []
    for index in AUDIT_VIDEOS:
        video = run / entries[index]["video"] if index in entries else None
        if video is None or not video.is_file():
            raise Failed(f"{run}: audit video {index} is not there: make the accuracy run again")
        (place / "videos").mkdir(exist_ok=True)
        shutil.copyfile(video, place / "videos" / f"{index}.mp4")
        captions.append(f"{index}  {entries[index]['prompt']}")
    _write(place / "videos" / "captions.txt", "\n".join(captions) + "\n")
    return [] if scored else [NO_SCORE]


def _archive(source: Path, commit: str, place: Path) -> None:
    """Write the files of a commit, nothing else that lies in the checkout."""
    top = _git(source, "rev-parse", "--show-toplevel").strip()
    done = subprocess.run(["git", "archive", "--format=tar", commit], cwd=top, capture_output=True, check=True, timeout=600)
    place.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(place, filter="data")


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, text)
