"""A campaign -> the tree that MLCommons' checker takes (v6.1). The campaign is only read; the tree appears when it is whole."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import yaml

from sut import accuracy_log, loadgen
from sut.compliance import VERDICT
from sut.result import Result, Scenario
from wan_mlperf.errors import BadInput
from wan_mlperf.files import atomic_write, scratch
from wan_mlperf.inputs.text import read_text
from wan_mlperf.submit import client_results, documents, provenance, requirements, system_description
from wan_mlperf.submit import source as checkout
from wan_mlperf.submit.campaign import Campaign, Stage, State
from wan_mlperf.submit.requirements import Problem

SOURCE = Path(__file__).resolve().parents[2]
IMPLEMENTATION = "wan_mlperf"
LOGS = ("mlperf_log_summary.txt", "mlperf_log_detail.txt")
NO_SCORE = "no VBench score: this tree is from a dry run and is not to be submitted"


def pack(
    folder: Path,
    *,
    submitter: str,
    division: str,
    system: Path,
    output: Path,
    dry_run: bool,
    bandwidth: Path | None = None,
    source: Path = SOURCE,
) -> list[str]:
    """Build the tree in `output`; return notes for the submitter.

    `bandwidth` is a person's description of the data path, `source` the git checkout that made the results. Raises BadInput for
    a campaign that cannot be submitted, with everything that is missing. A dry run is packed despite most of it.
    """
    for what, name in (("--submitter", submitter), ("--system", system.stem)):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}", name):
            raise BadInput(f"{what} {name!r} is a folder's name in the tree; allowed: letters, digits, '.', '_' and '-'")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise BadInput(f"-o {str(output)!r} is there and not empty; allowed: a folder that is not there yet")
    commit, dirty = checkout.inspect(source)
    campaign = Campaign.load(folder, commit=commit)
    states = {stage: campaign.state(stage) for stage in campaign.stages()}
    description, measured = _describe(states, system, division=division, submitter=submitter)
    stated = _read(bandwidth)
    problems = [Problem(what=dirty, hard=True)] if dirty else []
    if campaign.dry_run and not dry_run:
        problems.append(Problem(what="it is a dry run's; allowed: with --dry-run, to see the tree", hard=True))
    problems += requirements.of_campaign(campaign, states, division)
    problems += requirements.of_description(description, measured, division)
    if division == "closed":
        problems += provenance.link_problems(performance_results(states), measured, stated)
    problems = requirements.listed(problems)
    fatal = [one for one in problems if one.hard or not dry_run]
    if fatal:
        number = "1 thing is" if len(fatal) == 1 else f"{len(fatal)} things are"
        raise BadInput(
            f"campaign {str(folder)!r} cannot be packed for the {division} division, {number} missing: "
            f"{'; '.join(map(str, fatal))}"
        )
    description.update(dict.fromkeys(system_description.unfilled(description), system_description.UNKNOWN))

    output.parent.mkdir(parents=True, exist_ok=True)
    with scratch("tree", inside=output.parent) as folder:
        tree = folder / "tree"
        root = tree / division / submitter
        for scenario in campaign.recipes:
            place = root / "results" / system.stem / loadgen.MODEL / loadgen.SCENARIOS[scenario]
            _scenario(place, scenario, campaign, states)
        _write_json(root / "systems" / f"{system.stem}.json", description)
        _write_documents(root, campaign, states, measured, stated, system.stem)
        checkout.archive(source, commit, root / "src" / loadgen.MODEL / IMPLEMENTATION)
        _write_json(root / "src" / loadgen.MODEL / IMPLEMENTATION / "REPRODUCIBILITY.json", _reproducibility(states))
        if output.exists():
            output.rmdir()
        tree.rename(output)
    return requirements.as_notes(problems)


def performance_results(states: Mapping[Stage, State]) -> dict[str, Result]:
    """The performance run's result of each scenario that has one, under MLCommons' name."""
    found = {}
    for stage, state in states.items():
        if stage.kind == "performance" and state.done and state.result is not None:
            found[loadgen.SCENARIOS[stage.scenario]] = state.result
    return found


def _describe(
    states: Mapping[Stage, State], system: Path, *, division: str, submitter: str
) -> tuple[dict[str, object], Mapping[str, str]]:
    """Return the whole system description, and what the runs measured of the system."""
    measured: Mapping[str, str] = next((one.result.system for one in states.values() if one.result and one.result.system), {})
    person = system_description.read(system)
    return system_description.complete(person, measured, division=division, submitter=submitter), measured


def _read(file: Path | None) -> str | None:
    if file is None:
        return None
    text = read_text(file, what="--bandwidth", allowed="a text file that describes the data path").strip()
    if not text:
        raise BadInput(f"--bandwidth {str(file)!r}: is empty; allowed: a description of the data path")
    return text


def _write_documents(
    root: Path,
    campaign: Campaign,
    states: Mapping[Stage, State],
    measured: Mapping[str, str],
    stated: str | None,
    system: str,
) -> None:
    """Write documentation/ and the submitter's README.md."""
    recipes = {loadgen.SCENARIOS[scenario]: yaml.safe_load(text) for scenario, text in campaign.recipes.items()}
    _write(root / "documentation" / "calibration.md", documents.calibration(recipes, performance_results(states)))
    _write(root / "documentation" / "bandwidth.md", provenance.bandwidth(performance_results(states), measured, stated))
    notes: dict[str, dict[str, str]] = {}
    for stage, state in states.items():
        notes.setdefault(loadgen.SCENARIOS[stage.scenario], {})[stage.kind] = state.note
    _write(root / "README.md", provenance.readme(root.name, system, root.parent.name, notes))


def _reproducibility(states: Mapping[Stage, State]) -> dict[str, object]:
    scored = {loadgen.SCENARIOS[stage.scenario]: state.vbench for stage, state in states.items() if state.vbench is not None}
    results = performance_results(states)
    run = next(state.run for stage, state in states.items() if stage.kind == "performance" and state.run is not None)
    if any(result.harness == "endpoints" for result in results.values()):
        return provenance.reproducibility(results, scored, {"endpoints_client": client_results.version(run)})
    return provenance.reproducibility(results, scored, {"loadgen": str(loadgen.read_detail(run).get("loadgen_version", ""))})


def _scenario(place: Path, scenario: Scenario, campaign: Campaign, states: Mapping[Stage, State]) -> None:
    """Write the results of one scenario."""
    runs = {stage.kind: state for stage, state in states.items() if stage.scenario == scenario}
    performance, test04 = (runs[kind].run for kind in ("performance", "test04"))
    assert performance and test04 and runs["performance"].result
    if campaign.harness == "endpoints":
        summary = runs["vbench"].vbench
        client_results.pack(performance, place, score=summary.score if summary else None)
        _scores_and_videos(place / "accuracy", performance, scored=summary is not None, digest=None)
    else:
        accuracy = runs["accuracy"].run
        assert accuracy
        _logs(performance, place / "performance" / "run_1")
        _logs(test04, place / "TEST04" / "performance" / "run_1")
        shutil.copyfile(test04 / VERDICT, place / "TEST04" / VERDICT)
        _logs(accuracy, place / "accuracy")
        digest = accuracy_log.submitted(accuracy, place / "accuracy" / accuracy_log.NAME)
        _scores_and_videos(place / "accuracy", accuracy, scored=runs["vbench"].vbench is not None, digest=digest)
        shutil.copyfile(performance / "user.conf", place / "user.conf")
    recipe = yaml.safe_load(campaign.recipes[scenario])
    _write_json(place / "measurements.json", documents.measurements(recipe, runs["performance"].result))
    notes_of_runs = {kind: state.note for kind, state in runs.items()}
    _write(place / "README.md", documents.readme(scenario, recipe, runs["performance"].result, notes_of_runs))


def _logs(run: Path, place: Path) -> None:
    place.mkdir(parents=True)
    for name in LOGS:
        shutil.copyfile(run / name, place / name)


def _scores_and_videos(place: Path, run: Path, *, scored: bool, digest: str | None) -> None:
    """Write into the accuracy folder: scores with the hash of LoadGen's log, if there is one; raw results; audit videos."""
    lines = [NO_SCORE]
    if scored:
        lines = (run / "accuracy.txt").read_text(encoding="utf-8").splitlines()
        shutil.copytree(run / "vbench", place / "vbench", ignore=shutil.ignore_patterns("staged", "*.log"))
    kept = [line for line in lines if not line.startswith("hash=")]
    _write(place / "accuracy.txt", "\n".join([*kept, *([f"hash={digest}"] if digest else [])]) + "\n")
    entries = {entry["index"]: entry for entry in json.loads((run / "prompts.json").read_text(encoding="utf-8"))}
    captions = []
    (place / "videos").mkdir()
    for index in requirements.AUDIT_VIDEOS:
        shutil.copyfile(run / entries[index]["video"], place / "videos" / f"{index}.mp4")
        captions.append(f"{index}  {entries[index]['prompt']}")
    _write(place / "videos" / "captions.txt", "\n".join(captions) + "\n")


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, text)


def _write_json(file: Path, values: object) -> None:
    _write(file, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
