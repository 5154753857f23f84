"""`submit run --harness endpoints`: what the client is told, what its files become, and the tree that is packed of them."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from sut import result as results
from sut import run_record
from sut.prompts import benchmark_prompts
from tests import run_folders
from tests.conftest import ROOT
from tests.replicas import jobs
from tests.run_folders import rewrite
from tests.submit.packing import PERSON, SCENARIOS, git, make_real, pack
from wan_mlperf import process
from wan_mlperf.errors import BadInput
from wan_mlperf.submit import __main__ as submit
from wan_mlperf.submit import client, client_results, requirements
from wan_mlperf.submit.campaign import Campaign, Stage
from wan_mlperf.workload import DIMENSIONS, MLPERF, Workload

STAND_IN = Path(__file__).with_name("stand_in_client.py")
# Of `wan22_prompts.jsonl` in MLCommons' endpoints at ea332753.
ROWS = "3d7a5a77b0e58991efe5f557e483b12f9836da71f33a2a78179e340c21dead4c"


def environment(folder: Path) -> Path:
    """An environment whose client is the stand-in."""
    program = folder / "client" / "bin" / client.PROGRAM
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" "$@"\n')
    program.chmod(0o755)
    return folder / "client"


def test_the_client_is_found_or_one_line_says_how_to_get_it(tmp_path: Path) -> None:
    place = environment(tmp_path)
    (place / "bin" / "python").symlink_to(sys.executable)  # as in a virtual environment
    for named in (place, place / "bin", place / "bin" / "python", place / "bin" / client.PROGRAM):
        assert client.find(str(named)) == place / "bin" / client.PROGRAM
    for missing in (None, str(tmp_path), str(tmp_path / "nowhere"), sys.executable):
        with pytest.raises(BadInput, match=r"--client .*python3\.12 -m venv client && client/bin/pip install"):
            client.find(missing)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--harness", "endpoints"], "needs MLCommons' client; allowed: --client with"),
        (["--client", "/nowhere"], "--client has no effect"),
        (["--harness", "endpoints", "--client", "CLIENT", "--dry-run", "--full-length"], "--full-length with --harness"),
        (["--harness", "endpoints", "--client", "CLIENT", "--keep-accuracy-log"], "it is about LoadGen"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path: Path, words: list[str], says: str) -> None:
    place = environment(tmp_path)
    with pytest.raises(BadInput, match=says):
        submit.parse(["run", "--campaign", str(tmp_path), *(str(place) if one == "CLIENT" else one for one in words)])


def test_a_client_that_refuses_its_configuration_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "client.yaml"
    file.write_text("endpoint_config: {api_type: openai}\n")
    with pytest.raises(BadInput, match=r"refuses its configuration .* allowed: commit ea332753"):
        client.check(client.find(str(environment(tmp_path))), file)


def test_rows_are_the_clients_own_and_those_of_another_workload_say_so(tmp_path: Path) -> None:
    client.write_rows(tmp_path / "rows", benchmark_prompts(), MLPERF)
    assert hashlib.sha256((tmp_path / "rows").read_bytes()).hexdigest() == ROWS
    client.write_rows(tmp_path / "rows", ["a"], Workload(height=32, width=48, frames=5, fps=8, steps=2, guidance_low=2.5))
    (row,) = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert (row["size"], row["num_frames"], row["guidance_scale_2"], row["num_inference_steps"]) == ("32x48", 5, 2.5, 2)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_configuration(tmp_path: Path, scenario: Any) -> None:
    config = client.configuration(scenario, rows=tmp_path / "rows", run=tmp_path, dry_run=False)
    main, audit = client.main_of(config, "http://127.0.0.1:5"), client.audit_of(config, "http://127.0.0.1:5")
    assert "audit" not in main and len(main["datasets"]) == 2 and main["endpoint_config"]["endpoints"] == ["http://127.0.0.1:5"]
    assert audit["audit"]["only"] is True and [one["type"] for one in audit["datasets"]] == ["performance"]
    assert client.samples(config, 248)["performance"] == (248 if scenario == "offline" else 100)
    assert client.expected(scenario, "test04", dry_run=False) == 2 * 64 + 2 * 10
    short = client.configuration(scenario, rows=tmp_path / "rows", run=tmp_path, dry_run=True)
    assert short["settings"]["runtime"]["scheduler_random_seed"] == requirements.SEEDS["effective_schedule_rng_seed"]
    assert sum(client.samples(short, 248).values()) < 400


def test_the_score_is_left_open_in_a_way_that_the_client_reads(tmp_path: Path) -> None:
    """The real client's reader refuses NaN in JSON, and calls float() on what it finds [tried with it at ea332753]."""
    client.write_scorer(tmp_path)
    place = tmp_path / client.SCORER
    words = [str(place / "uv"), "run", "--project", str(place), "python", str(place / "vbench_runner.py")]
    subprocess.run([*words, "--out-dir", str(tmp_path), "--name", "x", "--dims", "a,b"], check=True, stdout=subprocess.DEVNULL)
    text = (tmp_path / "x_eval_results.json").read_text()
    assert "NaN" not in text
    assert set(json.loads(text)) == set(DIMENSIONS) and all(math.isnan(float(one[0])) for one in json.loads(text).values())


def summary(**changes: Any) -> dict[str, Any]:
    """A result summary as the real client wrote it, cut to what is read."""
    times = {"50.0": 2e9, "90.0": 2.2e9, "95.0": 2.3e9, "97.0": 2.3e9, "99.0": 2.4e9}
    counts = {"n_samples_issued": 248, "n_samples_completed": 248, "n_samples_failed": 0, "duration_ns": 620_000_000_000}
    latency = {"avg": 2.1e9, "percentiles": times, "early_stopping_percentiles": {"99.0": None, "90.0": 2.25e9}}
    return {"version": "0.1.0", "git_sha": None, **counts, "state": "complete", "complete": True, "latency": latency, **changes}


def write_run(run: Path, scenario: Any, commit: str, **changes: Any) -> None:
    """A run folder as the client and `keep_videos` leave it, with its audit."""
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(run_folders.RECIPE)
    config = client.configuration(scenario, rows=run / "rows", run=run, dry_run=False)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("performance", "accuracy", "audit/reference/performance", "audit/output_caching/performance", "served"):
        (run / name).mkdir(parents=True)
    (run / "performance" / "result_summary.json").write_text(json.dumps(summary(**changes)))
    entry = {"dataset_name": client.ACCURACY, "score": float("nan"), "total_samples": 248, "dataset_type": "accuracy"}
    (run / "accuracy" / "accuracy_results.json").write_text(json.dumps({"accuracy_scores": [entry]}))
    verdict = {"test": "output_caching_test", "passed": True, "reason": "audit_qps=0.1 < 0.11"}
    (run / "audit" / "audit_output_caching_test.json").write_text(json.dumps(verdict))
    prompts = benchmark_prompts()
    lines = []
    for index in range(len(prompts)):
        video = run / "served" / f"video_{index}.mp4"
        video.write_bytes(b"video %d" % index)
        data = ["TextModelOutput", str(video), None, None]
        lines.append(json.dumps({"event_type": "sample.complete", "sample_uuid": f"u{index}", "data": data}))
    (run / "events.jsonl").write_text("\n".join([*lines, '{"event_type": "session.ended", "sam']))
    (run / "sample_idx_map.json").write_text(json.dumps({client.ACCURACY: {f"u{index}": index for index in range(len(prompts))}}))
    known = run_folders.result(scenario, "performance", commit=commit)
    drop = ("scenario", "mode", "valid", "queries", "spans", "host", "system", "generate_mean_s", "start_s", "version")
    made_by = {key: value for key, value in known.items() if key not in drop and not key.startswith(("latency", "samples"))}
    client_results.write_result(
        run,
        made_by,
        scenario=scenario,
        prompts=prompts,
        planned=100,
        videos=client_results.keep_videos(run, prompts),
        stages={"denoise_low": 1.0, "video": 2.0},
        start_s=3.0,
        host=known["host"],
        system=known["system"],
        stopped=None,
    )


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """A checkout, and a whole campaign by the client of its commit."""
    source, campaign = tmp_path / "source", tmp_path / "campaign"
    source.mkdir()
    (source / "code.py").write_text("print()\n")
    git(source, "init", "-q")
    git(source, "add", "-A")
    git(source, "commit", "-q", "-m", "one")
    campaign.mkdir()
    commit = git(source, "rev-parse", "HEAD")
    recipes = {one: run_folders.RECIPE for one in SCENARIOS}
    Campaign.begin(campaign, recipes, dry_run=True, commit=commit, harness="endpoints")
    for scenario in SCENARIOS:
        write_run(campaign / f"20260101-000000-{scenario}-performance", scenario, commit)
    return source, campaign


def test_the_tree_is_what_the_checker_reads(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, campaign = made
    make_real(campaign)
    for run in campaign.glob("2026*"):
        run_folders.score(run, 70.5)
    notes = pack(source, campaign, tmp_path / "out", PERSON, division="closed", dry_run=False)
    assert notes == []
    root = tmp_path / "out" / "closed" / "ORG"
    for name in ("SingleStream", "Offline"):
        place = root / "results" / "8xGPU" / "wan-2.2-t2v-a14b" / name
        files = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
        needed = {"config.yaml", "measurements.json", "README.md", "performance/result_summary.json"}
        needed |= {"accuracy/accuracy_results.json", "accuracy/accuracy.txt", "audit/audit_output_caching_test.json"}
        assert needed <= files and not any("mlperf_log" in file or file == "user.conf" for file in files)
        assert len(list((place / "accuracy" / "videos").glob("*.mp4"))) == 10
        scores = json.loads((place / "accuracy" / "accuracy_results.json").read_text())
        assert scores["average_accuracy"] == scores["accuracy_scores"][0]["score"] == 0.705
        assert "--harness endpoints" in (place / "README.md").read_text()
    code = root / "src" / "wan-2.2-t2v-a14b" / "wan_mlperf"
    assert json.loads((code / "REPRODUCIBILITY.json").read_text())["endpoints_client"] == "0.1.0"
    assert (place / "accuracy" / "videos" / "130.mp4").read_bytes() == b"video 130"


def test_stages_are_read_from_the_clients_files(made: tuple[Path, Path]) -> None:
    source, campaign = made
    found = Campaign.load(campaign, commit=git(source, "rev-parse", "HEAD"))
    notes = {str(stage): found.state(stage).note for stage in found.stages() if found.state(stage).done}
    assert (
        notes["singlestream performance"] == "VALID, mean 2.100 s" and notes["offline performance"] == "VALID, 0.4000 samples/s"
    )
    assert notes["offline test04"] == "audit_qps=0.1 < 0.11" and len(notes) == 6
    half = campaign / "20260101-000000-offline-performance" / "audit" / "output_caching" / "performance"
    (half / "result_summary.json").write_text(json.dumps(summary(n_samples_failed=3)))  # the client lets it pass [seen]
    assert not found.state(Stage(scenario="offline", kind="test04")).done
    (half / "result_summary.json").unlink()
    (moved,) = found.set_aside(Stage(scenario="offline", kind="test04"))
    assert (moved / "audit_output_caching_test.json").is_file()
    assert found.state(Stage(scenario="offline", kind="test04")).note == "not run"
    with pytest.raises(BadInput, match="was begun with --harness endpoints"):
        Campaign.begin(campaign, found.recipes, dry_run=True, commit=found.commit)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_samples_failed": 1, "n_samples_completed": 247}, "247 of 100 samples completed, 1 failed"),
        ({"n_samples_issued": 60, "n_samples_completed": 60}, "60 of 100 samples"),
        ({"complete": False, "state": "interrupted"}, "the client ended in the state 'interrupted'"),
    ],
)
def test_a_run_that_does_not_count(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    """The real client ends with exit code 0 when samples have failed."""
    write_run(tmp_path / "run", "offline", "commit", **change)
    result = results.read(tmp_path / "run")
    assert not result.valid and says in (result.invalid_reason or "")


def test_what_the_rules_ask_for_beyond_the_clients_files(made: tuple[Path, Path]) -> None:
    _, campaign = made
    run = campaign / "20260101-000000-offline-performance"
    asked: dict[str, Any] = {"duration_s": 600, "samples": 248}
    seeds = {"scheduler_random_seed": 16159082839903944936, "dataloader_random_seed": 2747215439041700203}
    assert client_results.log_problems(run, seeds=seeds, **asked) == client_results.rule_problems(run, **asked) == []
    rewrite(run / "performance" / "result_summary.json", duration_ns=10_000_000_000, n_samples_issued=24)
    assert client_results.rule_problems(run, **asked) == [
        "the performance run took 10 s; allowed: 600 s or more",
        "24 samples; allowed: 248 or more",
    ]
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["settings"]["runtime"].update(min_duration_ms=1000, dataloader_random_seed=42)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "accuracy" / "accuracy_results.json").unlink()
    first, second, third = client_results.log_problems(run, seeds=seeds, **asked)
    assert "min_duration_ms is 1000" in first and "dataloader_random_seed is 42" in second and "0 accuracy samples" in third


def test_an_audit_that_failed_is_not_made_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The client makes it in the call that measures; a new start repeats it alone, for the run that is there."""
    words = ["run", "--harness", "endpoints", "--client", str(environment(tmp_path)), "--dry-run", "--recipe", "tiny"]
    options = submit.parse([*words, "--scenario", "offline", "--campaign", str(tmp_path / "campaign")])
    asked: list[list[str]] = []

    def start(command: Sequence[str]) -> int:
        asked.append(list(command))
        run = tmp_path / "campaign" / "20260101-000000-offline-performance"
        if "--audit-of" in command:
            rewrite(run / "audit" / "audit_output_caching_test.json", passed=True)
        else:
            write_run(run, "offline", run_record.commit())
            rewrite(run / "audit" / "audit_output_caching_test.json", passed=False, reason="audit_qps=0.2 >= 0.11")
        return process.DONE

    assert submit.run(options, start) == process.INVALID and len(asked) == 1
    assert "offline test04: INVALID, audit_qps=0.2 >= 0.11" in capsys.readouterr().out
    assert submit.run(options, start) == process.DONE and len(asked) == 2
    assert asked[1][asked[1].index("--audit-of") + 1].endswith("20260101-000000-offline-performance")
    assert asked[0][1:3] == ["-m", "wan_mlperf.submit.client_run"] and "--dry-run" in asked[0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_way_with_a_server_and_the_stand_in(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real server of two replicas and the recorded client's requests; started again, nothing is left to do."""
    monkeypatch.chdir(ROOT)
    recipe, campaign = jobs.write_recipe(tmp_path, model), tmp_path / "campaign"
    words = ["run", "--harness", "endpoints", "--client", str(environment(tmp_path)), "--dry-run", "--campaign", str(campaign)]
    words += ["--recipe", str(recipe), "--scenario", "offline"]
    assert submit.main(words) == process.DONE
    (run,) = campaign.glob("2*-performance")
    result = results.read(run)
    assert result.harness == "endpoints" and result.valid and result.queries == client.DRY_SAMPLES
    assert result.spans["denoise_low"] > 0 and result.generate_mean_s > 0 and result.world_size == 2
    assert len(list((run / "videos").glob("*.mp4"))) == 248 and not (run / "served").exists()
    assert jobs.partial_files(run / "videos") == []
    assert client_results.read(run / client_results.SCORES)["accuracy_scores"][0]["score"] is None
    (tmp_path / "client" / "bin" / client.PROGRAM).write_text("#!/bin/sh\nexit 9\n")
    assert submit.main(words) == process.DONE, "everything was done"
