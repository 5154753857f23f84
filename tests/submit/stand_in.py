"""A stand-in for the processes that `submit run` starts, and `submit run` with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sut import loadgen, run_record
from sut.result import Scenario
from tests import run_folders
from wan_mlperf import process
from wan_mlperf.recipe import load_recipe, to_yaml
from wan_mlperf.submit import __main__ as submit
from wan_mlperf.submit.campaign import Campaign

ALL = [
    f"{scenario} {kind}" for scenario in ("singlestream", "offline") for kind in ("performance", "accuracy", "vbench", "test04")
]


class Runs:
    """Stands in for the processes that `submit run` starts: writes what they would write, and notes what was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.outcome: dict[str, Callable[[Path], None]] = {}
        self.stop_at: tuple[str, str] | None = None

    def __call__(self, words: Sequence[str]) -> int:
        assert list(words[:2]) == [sys.executable, "-m"]
        if words[2] == "wan_mlperf.vbench":
            folder = Path(words[3])
            stage = f"{json.loads((folder / 'result.json').read_text())['scenario']} vbench"
        else:
            values = dict(zip(words[3::2], words[4::2], strict=False))
            kind = "test04" if "--test04" in words else "accuracy" if "accuracy" in words else "performance"
            stage = f"{values['--scenario']} {kind}"
            folder = Path(values["--outputs"]) / f"20260101-{len(self.asked):06d}-{values['--scenario']}-{kind}"
        self.asked.append(stage)
        if self.stop_at == (stage, "before"):
            raise KeyboardInterrupt
        if stage.endswith("vbench"):
            (folder / "vbench").mkdir(exist_ok=True)
            if self.stop_at == (stage, "within"):
                raise KeyboardInterrupt
            run_folders.write_summary(folder, 70.1)
            (folder / "accuracy.txt").write_text("{'vbench_score': 70.1}\nhash=0\n")
        else:
            folder.mkdir()
            (folder / "recipe.yaml").write_text(RECIPE)
            if self.stop_at == (stage, "within"):
                raise KeyboardInterrupt
            reference = Path(words[words.index("--reference") + 1]).name if "--reference" in words else None
            (folder / "result.json").write_text(json.dumps(result(stage, reference)))
        if stage in self.outcome:
            self.outcome[stage](folder)
            return process.INVALID
        return process.DONE


def result(stage: str, reference: str | None = None) -> dict[str, Any]:
    scenario, kind = stage.split()
    times = {"generate_mean_s": 2.0, "start_s": 10.0, "samples_per_second": None}
    compliance = run_folders.audit_outcome(reference) if kind == "test04" else None
    mode = "accuracy" if kind == "accuracy" else "performance"
    return run_folders.result(scenario, mode, commit=run_record.commit(), compliance=compliance, **times)


TINY = load_recipe("tiny")
RECIPE = to_yaml(TINY)
USER_CONFS = {scenario: TINY.user_conf_path for scenario in loadgen.SCENARIOS}


def options(folder: Path, *more: str) -> Any:
    return submit.parse(["run", "--campaign", str(folder), "--recipe", "tiny", "--dry-run", *more])


def go(folder: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    """`submit run` on the tiny recipe with VBench's stages asked for."""
    monkeypatch.setattr(submit, "begin", lambda chosen: (begin(chosen, folder), USER_CONFS))
    return submit.run(options(folder, *more), runs)


def begin(chosen: Any, folder: Path) -> Campaign:
    folder.mkdir(exist_ok=True)
    scenarios: Sequence[Scenario] = chosen.scenario or ("singlestream", "offline")
    recipes = {scenario: RECIPE for scenario in scenarios}
    return Campaign.begin(folder, recipes, dry_run=False, commit=run_record.commit())
