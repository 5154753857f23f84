"""`submit run`: what is done is read from the folder, so it can be stopped anywhere and started again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sut import user_conf
from tests import run_folders
from tests.conftest import ROOT
from tests.submit.stand_in import ALL, RECIPE, Runs, begin, go, options, result
from wan_mlperf import process
from wan_mlperf.errors import BadInput
from wan_mlperf.recipe import CONFIGS
from wan_mlperf.submit import __main__ as submit
from wan_mlperf.submit.campaign import Stage


@pytest.fixture(autouse=True)
def _scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run uses what VBench wrote, so the stand-in's scores count. Without this its stage would never be started."""
    monkeypatch.setattr(submit, "warn_of_vbench", lambda _campaign: None)


def test_every_stage_once_in_order_and_nothing_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    runs = Runs()
    assert go(tmp_path, runs, monkeypatch) == process.DONE
    assert runs.asked == ALL
    assert go(tmp_path, runs, monkeypatch) == process.DONE
    assert runs.asked == ALL
    assert "everything is done" in capsys.readouterr().out


@pytest.mark.parametrize("moment", ["before", "within"])
@pytest.mark.parametrize("stage", ALL)
def test_stopped_at_any_stage_it_repeats_nothing_and_skips_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, moment: str
) -> None:
    runs = Runs()
    runs.stop_at = (stage, moment)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, runs, monkeypatch)
    assert runs.asked == ALL[: ALL.index(stage) + 1]
    runs.stop_at = None
    assert go(tmp_path, runs, monkeypatch) == process.DONE
    assert runs.asked == ALL[: ALL.index(stage) + 1] + ALL[ALL.index(stage) :]


def change(key: str, value: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        old = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps({**old, key: value}))

    return apply


@pytest.mark.parametrize(
    ("stage", "outcome", "says"),
    [
        ("singlestream performance", change("valid", False), "INVALID"),
        ("offline accuracy", change("commit", "another"), "of another commit"),
        ("offline performance", lambda folder: (folder / "recipe.yaml").write_text("name: other\n"), "of another recipe"),
        ("offline performance", lambda folder: (folder / "result.json").write_text("{"), "half a file, or not JSON"),
        ("offline performance", change("version", 99), "is of version 99"),
        ("offline vbench", lambda folder: (folder / "vbench" / "summary.json").write_text("{"), "half a file, or not JSON"),
        ("offline test04", change("compliance", run_folders.audit_outcome("x", "TEST FAIL: x")), "TEST FAIL"),
        ("offline vbench", lambda folder: (folder / "accuracy.txt").unlink(), "no score of the whole run"),
    ],
)
def test_a_result_that_does_not_count_is_left_and_its_followers_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, stage: str, outcome: Any, says: str
) -> None:
    runs = Runs()
    runs.outcome = {stage: outcome}
    assert go(tmp_path, runs, monkeypatch) == process.INVALID
    scenario, kind = stage.split()
    waiting = {"performance": f"{scenario} test04", "accuracy": f"{scenario} vbench"}.get(kind)
    assert runs.asked == [one for one in ALL if one != waiting]
    out = " ".join(capsys.readouterr().out.split())
    assert says in out and f"left: {stage}" in out
    runs.outcome = {}
    runs.asked.extend("x" * (100 - len(runs.asked)))  # later folders sort after the earlier ones
    assert go(tmp_path, runs, monkeypatch) == process.DONE
    assert runs.asked[100:] == [stage, *([waiting] if waiting else [])]


def test_a_newer_performance_run_asks_for_its_own_test04(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs()
    go(tmp_path, runs, monkeypatch)
    newer = tmp_path / "20270101-000000-offline-performance"
    newer.mkdir()
    (newer / "recipe.yaml").write_text(RECIPE)
    (newer / "result.json").write_text(json.dumps(result("offline performance")))
    runs.asked.extend("x" * 92)
    assert go(tmp_path, runs, monkeypatch) == process.DONE
    assert runs.asked[100:] == ["offline test04"]


@pytest.mark.parametrize(
    ("again", "repeated"), [("offline-performance", ["offline"]), ("performance", ["singlestream", "offline"])]
)
def test_a_stage_again_keeps_the_old_run_aside_and_asks_for_its_followers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, again: str, repeated: list[str]
) -> None:
    runs = Runs()
    go(tmp_path, runs, monkeypatch)
    old = sorted(path.name for scenario in repeated for path in tmp_path.glob(f"*-{scenario}-performance"))
    runs.asked.extend("x" * 92)
    assert go(tmp_path, runs, monkeypatch, "--again", again) == process.DONE
    assert runs.asked[100:] == [f"{scenario} {kind}" for scenario in repeated for kind in ("performance", "test04")]
    assert sorted(path.name for path in (tmp_path / "aside").iterdir()) == old
    assert all((tmp_path / "aside" / name / "result.json").is_file() for name in old)
    assert f"the old one is now {tmp_path / 'aside' / old[0]}" in capsys.readouterr().out
    assert go(tmp_path, runs, monkeypatch) == process.DONE and len(runs.asked) == 100 + 2 * len(repeated)


def test_vbench_again_moves_its_outcome_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs()
    go(tmp_path, runs, monkeypatch)
    asked = len(runs.asked)
    for number in (1, 2):  # a second time there is an old one aside already
        assert go(tmp_path, runs, monkeypatch, "--again", "offline-vbench") == process.DONE
        assert runs.asked[asked:] == ["offline vbench"] * number
    (run,) = tmp_path.glob("*-offline-accuracy")
    assert (run / "accuracy.txt").is_file()
    assert {path.name for path in (tmp_path / "aside" / run.name).iterdir()} == {
        *("vbench", "vbench-1", "accuracy.txt", "accuracy.txt-1")
    }


def test_again_names_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="--again: 'perfomance' is not known, did you mean 'performance'"):
        go(tmp_path, Runs(), monkeypatch, "--again", "perfomance")


def test_a_failed_test04_says_what_it_looks_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail(folder: Path) -> None:
        old = json.loads((folder / "result.json").read_text())
        outcome = {
            **run_folders.audit_outcome(old["compliance"]["reference"], "TEST FAIL: one repeated sample is 31.0% faster"),
            "rule": "less than 20% faster: a rule",
            "reasons": ["a noisy reference run: the medians differ by 0.1% only"],
            "reference_seconds": [2.0] * 90 + [4.0] * 10,
        }
        (folder / "result.json").write_text(json.dumps({**old, "compliance": outcome}))

    runs = Runs()
    runs.outcome = {"singlestream test04": fail}
    assert go(tmp_path, runs, monkeypatch) == process.INVALID
    out = capsys.readouterr().out
    assert "performance run: 100 samples: fastest / median / 90th percentile / slowest 2 / 2 / 2.2 / 4 s" in out
    assert "looks like a noisy reference run: the medians differ by 0.1% only" in out
    assert "rule: less than 20% faster: a rule" in out and "--again singlestream-performance" in out


def test_full_length_is_the_benchmarks_user_conf(tmp_path: Path) -> None:
    campaign, user_confs = submit.begin(options(tmp_path, "--full-length"))
    for conf in user_confs.values():
        assert user_conf.read(conf).values["Offline.min_duration"] == 600_000
    words = submit.command(campaign, Stage(scenario="offline", kind="performance"), options(tmp_path, "--full-length"))
    assert "--set=user_conf=mlperf/user.conf" in words
    with pytest.raises(BadInput, match="another recipe for singlestream: user_conf"):
        submit.begin(options(tmp_path))
    with pytest.raises(BadInput, match="--full-length has no effect"):
        submit.parse(["run", "--campaign", "x", "--full-length"])
    own = tmp_path / "own.yaml"
    own.write_text((CONFIGS / "tiny.yaml").read_text())
    chosen = submit.parse(["run", "--campaign", str(tmp_path / "b"), "--recipe", str(own), "--dry-run", "--full-length"])
    assert submit.begin(chosen)[1]["offline"] == CONFIGS / "mlperf" / "user.conf"


def test_room_for_the_accuracy_log_is_asked_for_at_the_start(tmp_path: Path) -> None:
    size = ["--set", "workload.height=4096", "--set", "workload.width=4096", "--set", "workload.frames=1025"]
    with pytest.raises(BadInput, match=r"allowed: 262\d\d.\d GB for an accuracy run"):
        submit.begin(options(tmp_path, *size))


def test_dry_run_asks_for_no_score_and_estimates_come_from_what_is_done(tmp_path: Path, capsys: Any) -> None:
    runs = Runs()
    assert submit.run(options(tmp_path, "--scenario", "singlestream"), runs) == process.DONE
    assert runs.asked == [stage for stage in ALL[:4] if "vbench" not in stage]
    out = capsys.readouterr().out
    assert "not known yet" in out
    assert "singlestream accuracy: starts, estimate 8 min" in out  # 10 s + 248 x 2 s
    assert "singlestream test04: starts, estimate 3 min" in out  # 10 s + 81 x 2 s


def test_another_campaign_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not the benchmark's; allowed: with --dry-run"):
        submit.begin(submit.parse(["run", "--campaign", str(tmp_path), "--recipe", "tiny"]))
    assert not any(tmp_path.iterdir())
    submit.begin(options(tmp_path))
    submit.begin(options(tmp_path))
    with pytest.raises(BadInput, match="another recipe for singlestream: steps: 20"):
        submit.begin(options(tmp_path, "--set", "workload.steps=3"))
    with pytest.raises(BadInput, match="scenarios singlestream, offline"):
        submit.begin(options(tmp_path, "--scenario", "offline"))
    (tmp_path / "campaign.json").write_text("[]")
    with pytest.raises(BadInput, match="not what `submit run` writes"):
        submit.begin(options(tmp_path))


def test_two_cannot_work_in_one_campaign_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    hold = "import sys, time; from pathlib import Path; from wan_mlperf.submit import __main__ as submit\n"
    hold += "with submit.locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(BadInput, match="still works in it"), submit.locked(tmp_path):
            pass
        other.kill()
        other.wait()
    with submit.locked(tmp_path):
        pass


def test_recipes_per_scenario_reach_their_runs(tmp_path: Path) -> None:
    chosen = options(tmp_path, "--offline-recipe", "other.yaml", "--set", "a=1", "--model", "m", "--exact")
    campaign = begin(chosen, tmp_path)
    words = [submit.command(campaign, Stage(scenario=one, kind="accuracy"), chosen) for one in ("singlestream", "offline")]
    for line, recipe in zip(words, ("tiny", "other.yaml"), strict=True):
        assert line[line.index("--recipe") + 1] == recipe
        assert line[line.index("--model") + 1] == "m" and "--set=a=1" in line and "--exact" in line
        assert line[line.index("--mode") + 1] == "accuracy"
