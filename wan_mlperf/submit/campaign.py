"""A campaign folder: the runs of a submission, and which of its stages are done.

No list of finished stages is kept: it could be wrong. A stage is done when the folder contains a whole, valid result of it, made
with this recipe and this commit. So a campaign can be stopped at any moment and started again.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sut import loadgen
from sut import result as results
from sut.result import Result, Scenario
from wan_mlperf.errors import BadInput
from wan_mlperf.files import atomic_write
from wan_mlperf.submit import client_results
from wan_mlperf.vbench import summary as vbench_summary
from wan_mlperf.vbench.summary import Summary

Harness = Literal["loadgen", "endpoints"]
# The stages of a scenario, in order, and the one that each has to wait for. The endpoints client makes the accuracy run's videos
# in the call that measures performance, and its audit follows while the server is up.
KINDS: Mapping[Harness, tuple[str, ...]] = {
    "loadgen": ("performance", "accuracy", "vbench", "test04"),
    "endpoints": ("performance", "test04", "vbench"),
}
NEEDS: Mapping[Harness, Mapping[str, str]] = {
    "loadgen": {"vbench": "accuracy", "test04": "performance"},
    "endpoints": {"vbench": "performance", "test04": "performance"},
}
FILE = "campaign.json"
ASIDE = "aside"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One piece of work: a run of LoadGen, or VBench's scores of one."""

    scenario: Scenario
    kind: str

    def __str__(self) -> str:
        return f"{self.scenario} {self.kind}"


@dataclass(frozen=True, kw_only=True)
class State:
    """Whether a stage is done, a line about it, its run folder, and the result of that run or of VBench."""

    done: bool
    note: str
    run: Path | None = None
    result: Result | None = None
    vbench: Summary | None = None


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """`recipes`: the resolved recipe as YAML per scenario; `commit`: results of any other do not count.

    `harness`: who asks for the samples, LoadGen or MLCommons' endpoints client.
    """

    folder: Path
    recipes: Mapping[Scenario, str]
    dry_run: bool
    commit: str
    harness: Harness = "loadgen"

    @classmethod
    def begin(
        cls, folder: Path, recipes: Mapping[Scenario, str], *, dry_run: bool, commit: str, harness: Harness = "loadgen"
    ) -> Campaign:
        """Write the folder's campaign.json, or continue the campaign that is there. Raises BadInput if that is another one."""
        if (folder / FILE).exists():
            old = cls.load(folder, commit=commit)
            if dict(old.recipes) != dict(recipes) or old.dry_run != dry_run or old.harness != harness:
                what = f"--harness {old.harness}" if old.harness != harness else _other(old, recipes, dry_run)
                raise BadInput(
                    f"--campaign {str(folder)!r}: was begun with {what}; "
                    "allowed: the same scenarios, recipes, --harness and --dry-run, or another folder"
                )
            return old
        values = {"dry_run": dry_run, "harness": harness, "recipes": dict(recipes)}
        atomic_write(folder / FILE, json.dumps(values, indent=1) + "\n")
        return cls(folder=folder, recipes=recipes, dry_run=dry_run, commit=commit, harness=harness)

    @classmethod
    def load(cls, folder: Path, *, commit: str) -> Campaign:
        """Read a campaign. Raises BadInput for a folder that is not a campaign."""
        try:
            values = json.loads((folder / FILE).read_text(encoding="utf-8"))
            dry_run = bool(values["dry_run"])
            harness: Harness = "endpoints" if values.get("harness") == "endpoints" else "loadgen"  # older ones name none
            return cls(folder=folder, recipes=dict(values["recipes"]), dry_run=dry_run, commit=commit, harness=harness)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not what `submit run` writes"
            raise BadInput(
                f"campaign {str(folder)!r}: {FILE} cannot be read ({reason}); allowed: a folder of `submit run`"
            ) from None

    def stages(self) -> list[Stage]:
        """Return all stages in the order in which they run: cheap ones first, VBench once its videos exist."""
        kinds = KINDS[self.harness]
        return [
            Stage(scenario=scenario, kind=kind) for scenario in loadgen.SCENARIOS if scenario in self.recipes for kind in kinds
        ]

    def need(self, stage: Stage) -> Stage | None:
        """The stage that this one has to wait for."""
        kind = NEEDS[self.harness].get(stage.kind)
        return Stage(scenario=stage.scenario, kind=kind) if kind else None

    def state(self, stage: Stage) -> State:
        """Find a stage's newest result that counts. If there is none, say what is wrong with the newest."""
        if stage.kind == "vbench":
            return self._vbench_state(stage)
        if stage.kind == "test04" and self.harness == "endpoints":
            return self._audit_state(stage)
        found = State(done=False, note="not run")
        for run in self._runs(stage):
            state = self._judge(stage, run)
            if state.done:
                return state
            found = state if found.run is None else found
        return found

    def set_aside(self, stage: Stage) -> list[Path]:
        """Move what counts for a stage to `aside/`, so that it is done again; return where it is now. Nothing is deleted."""
        state = self.state(stage)
        if not state.done or state.run is None:
            return []
        if stage.kind == "vbench":
            old = [one for one in (state.run / "vbench", state.run / "accuracy.txt") if one.exists()]
        elif self.harness == "endpoints" and stage.kind == "test04":
            old = [state.run / client_results.AUDIT]
        else:
            old = [state.run]
        moved = []
        for path in old:
            inside = path.relative_to(self.folder)
            place = next(one for one in _numbered(self.folder / ASIDE / inside) if not one.exists())
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
            moved.append(place)
        return moved

    def _runs(self, stage: Stage) -> list[Path]:
        """Return the finished runs of a stage, newest first. A run without result.json was stopped."""
        pattern = re.compile(rf"\d{{8}}-\d{{6}}-{stage.scenario}-{stage.kind}(-\d+)?")
        runs = [file.parent for file in self.folder.glob(f"*/{results.FILE}") if pattern.fullmatch(file.parent.name)]
        return sorted(runs, key=lambda run: run.name, reverse=True)

    def _judge(self, stage: Stage, run: Path) -> State:
        try:
            result = results.read(run)
            recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
        except BadInput as error:
            return State(done=False, note=str(error), run=run)
        except (OSError, ValueError) as error:
            return State(done=False, note=f"{run.name}: recipe.yaml cannot be read ({error})", run=run)
        note = self._why_not(stage, result, recipe)
        return State(done=note is None, note=note or _score(stage, result), run=run, result=result)

    def _why_not(self, stage: Stage, result: Result, recipe: str) -> str | None:
        if recipe != self.recipes[stage.scenario]:
            return "of another recipe"
        if result.commit != self.commit:
            return f"of another commit, {result.commit[:12]}{'-dirty' * result.commit.endswith('-dirty')}"
        if not result.valid:
            return f"INVALID: {result.invalid_reason or 'LoadGen gives no reason'}"
        if stage.kind == "test04":
            reference = self.state(Stage(scenario=stage.scenario, kind="performance")).run
            if result.compliance is None:
                return "not a TEST04 run"
            if not result.compliance.passed:
                return result.compliance.verdict
            if reference is None or result.compliance.reference != reference.name:
                return f"compared with another performance run, {result.compliance.reference}"
        return None

    def _audit_state(self, stage: Stage) -> State:
        """The endpoints client's audit is in the performance run's folder."""
        performance = self.state(Stage(scenario=stage.scenario, kind="performance"))
        if not performance.done or performance.run is None:
            return State(done=False, note="not run")
        verdict = client_results.audit(performance.run)
        if verdict is None:
            return State(done=False, note="not run")
        return State(done=verdict[0], note=verdict[1], run=performance.run)

    def _vbench_state(self, stage: Stage) -> State:
        """VBench's results are in the folder of the run that made the videos."""
        made = self.need(stage)
        assert made is not None
        accuracy = self.state(made)
        if not accuracy.done or accuracy.run is None:
            return State(done=False, note="not run")
        note = "not run"
        if (accuracy.run / vbench_summary.FILE).is_file():
            try:
                summary = vbench_summary.read(accuracy.run)
            except BadInput as error:
                return State(done=False, note=str(error), run=accuracy.run)
            if summary.score is not None and (accuracy.run / "accuracy.txt").is_file():
                word = "reaches" if summary.reached else "is below"
                note = f"VBench {summary.score:.4f} {word} {summary.floor}"
                return State(done=True, note=note, run=accuracy.run, vbench=summary)
            note = "no score of the whole run"
        if self.dry_run:
            return State(done=True, note="no score: a dry run does not ask for one", run=accuracy.run)
        return State(done=False, note=note, run=accuracy.run)


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in itertools.count(1):
        yield path.with_name(f"{path.name}-{number}")


def speed(campaign: Campaign, stage: Stage) -> tuple[float, float] | None:
    """Return seconds of start-up and per sample, from a finished run of the stage's scenario, or else of the other one."""
    scenarios = sorted(campaign.recipes, key=lambda scenario: scenario != stage.scenario)
    for kind in ("performance", "test04", "accuracy"):
        for scenario in scenarios:
            state = campaign.state(Stage(scenario=scenario, kind=kind))
            if state.done and state.result is not None:
                rate = state.result.samples_per_second
                return state.result.start_s, 1 / rate if rate else state.result.generate_mean_s
    return None


def _score(stage: Stage, result: Result) -> str:
    if stage.kind == "accuracy":
        return f"{result.queries} videos"
    if result.compliance is not None:
        return result.compliance.verdict
    if result.harness == "endpoints" and result.latency_mean_s:
        return f"VALID, mean {result.latency_mean_s:.3f} s"
    rate, early = result.samples_per_second, result.latency_early_stopping_s
    return f"VALID, {rate:.4f} samples/s" if rate else f"VALID, {early:.3f} s" if early else "VALID"


def _other(old: Campaign, recipes: Mapping[Scenario, str], dry_run: bool) -> str:
    """Say in a few words what this campaign was begun with that is different now."""
    if list(old.recipes) != list(recipes):
        return f"scenarios {', '.join(old.recipes)}"
    if old.dry_run != dry_run:
        return "--dry-run" if old.dry_run else "no --dry-run"
    for scenario, text in old.recipes.items():
        now = recipes[scenario].splitlines()
        changed = [line.strip() for line in text.splitlines() if line not in now]
        if changed:
            return f"another recipe for {scenario}: {', '.join(changed[:3])}"
    return "another recipe"
