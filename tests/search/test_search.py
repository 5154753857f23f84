"""The command on a small model: what it finds, writes, keeps, and refuses."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from tests.conftest import run_module
from wan_mlperf import experts
from wan_mlperf.bench.fidelity import prompts_of
from wan_mlperf.errors import BadInput
from wan_mlperf.recipe import Faults, load_recipe
from wan_mlperf.replicas.watch import Watch
from wan_mlperf.search import __main__ as command
from wan_mlperf.search import choices, measure
from wan_mlperf.step_plan import Step

STEPS = 5
SMALL = [f"--set=workload.steps={STEPS}", *(f"--set=workload.{key}" for key in ("height=32", "width=32", "frames=5"))]
# A random model's blocks change much in each step, so that every reuse has a large error.
ARGUMENTS = [*SMALL, "--forwards", "7", "--division", "open", "--worst-edge", "5", "--prompts", "2", "--finalists", "3"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search-cache")


def search(model: Path, output: Path, *more: str) -> dict[str, Any]:
    assert command.main(["--model", str(model), "--set=mesh.ranks=1", *ARGUMENTS, "-o", str(output), *more]) == 0
    record: dict[str, Any] = json.loads((output / "search.json").read_text())
    return record


def test_it_finds_a_schedule_within_the_budget_and_goes_on_where_it_was(
    model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WAN_MLPERF_CACHE", str(cache))
    ran: list[str] = []
    run = measure.Bench.run

    def counted(self: measure.Bench, *arguments: Any, name: str, **keys: Any) -> Any:
        ran.append(name)
        if len(ran) == 9 and "stopped" not in ran:
            ran.append("stopped")
            raise KeyboardInterrupt
        return run(self, *arguments, name=name, **keys)

    monkeypatch.setattr(measure.Bench, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        search(model, tmp_path / "out")
    begun = set(ran) - {"exact", "stopped"}
    ran[:] = ["stopped"]
    record = search(model, tmp_path / "out")
    again = begun & set(ran)
    assert len(begun) == 8 and len(again) == 1, "only the trial that was stopped is run again"

    assert record["chosen"]["cost"] <= 7 < record["own"]["cost"] == 2 * STEPS
    found = next(one for one in record["outcomes"] if one["name"] == "found")
    assert found["measured"] == pytest.approx(found["predicted"], rel=0.5)
    errors = [point["error"] for point in record["front"]]
    assert errors == sorted(errors, reverse=True)
    page = (tmp_path / "out" / "search.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "") and "Run from end to end" in page
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert list(recipe.reuse.steps) == record["chosen"]["schedule"]["reuse"]
    assert list(recipe.guidance.off) == record["chosen"]["schedule"]["off"]
    assert "recipe: " in capsys.readouterr().out


def test_a_trial_starts_where_it_differs(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its latents are, bit for bit, those of a run from the noise; the steps before are not computed again."""
    sizes = [one.removeprefix("--set=") for one in SMALL]
    recipe = load_recipe("tiny", overrides=[*sizes, f"model.checkpoint={model}", "model.dtype=float32", "mesh.ranks=1"])
    bench = measure.Bench(recipe, ["a red circle", "a blue square"], Watch(Faults()), kernels=("sdpa", "sage_fp4"), batch=2)
    base = choices.exact(STEPS)
    bench.pipeline(base.formats())
    options = choices.Options(attention=(("sdpa", "sage_fp4"),) * STEPS, formats=(("bf16", "bf16"),), skip=True)
    trials = choices.trials(bench.plan(base), options)
    forwards = {"0 unguided": 2 * STEPS - 1, "3 sage_fp4": 4, "4 unguided": 1, "2+1 x0.9": 4, "2+2 x1.1": 2}
    calls: list[float] = []
    whole = experts.Expert.run_branches

    def counted(self: Any, tokens: Any, latents: Any, timestep: float, texts: Any, *rest: Any) -> Any:
        calls.extend([timestep] * len(texts))
        return whole(self, tokens, latents, timestep, texts, *rest)

    monkeypatch.setattr(experts.Expert, "run_branches", counted)
    alone = {name: bench.run(trials[name], name=name) for name in forwards}
    bench.run(base, name="exact")
    for name, number in forwards.items():
        calls.clear()
        made, other = bench.run(trials[name], name=name), alone[name]
        assert made is not None and other is not None and torch.equal(made.latents, other.latents), name
        assert len(calls) == number, name
    calls.clear()
    assert bench.run(base, name="exact again") is not None and not calls


def test_other_weights_or_prompts_are_another_ledger(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_MLPERF_CACHE", str(cache))
    measure.Ledger({"test": 1}).add("3 unguided", np.array([0.1, 0.2]))
    assert list(measure.Ledger({"test": 1}).read("3 unguided")) == [0.1, 0.2]
    assert not measure.Ledger({"test": 2}).has("3 unguided")


@pytest.mark.slow
def test_two_replicas_find_what_one_finds(model: Path, tmp_path: Path) -> None:
    records = []
    for name, mesh in (("one", ["--set=mesh.ranks=1"]), ("two", ["--set=mesh.ranks=2", "--set=mesh.replicas=2"])):
        folder = tmp_path / name
        words = ["wan_mlperf.search", "--model", str(model), *ARGUMENTS, *mesh, "-o", str(folder)]
        done = run_module(words, env={"WAN_MLPERF_CACHE": str(tmp_path / f"cache-{name}")})
        assert done.returncode == 0, done.stderr[-3000:]
        records.append(json.loads((folder / "search.json").read_text()))
    one, two = records
    assert one["squares"].keys() == two["squares"].keys()
    assert one["squares"] == pytest.approx(two["squares"], rel=1e-3)
    assert one["chosen"]["schedule"] == two["chosen"]["schedule"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "one of --seconds, --forwards and --error"),
        (["--seconds", "9", "--error", "0.1"], "one of --seconds, --forwards and --error"),
        (["--forwards", "20"], "--division closed: every schedule of it has the same forward passes"),
        (["--seconds", "9"], "--seconds with --hardware or --seconds-from"),
        (["--seconds", "-1", "--hardware", "mi355x"], "--seconds: -1 is not allowed"),
        (["--seconds", "nan", "--hardware", "mi355x"], "--seconds: invalid float value: 'nan'"),
        (["--error", "0.1", "--hardware", "mi999"], "hardware 'mi999': is not known"),
        (["--error", "0.1", "--hardware", "mi355x", "--gpus", "0"], "--gpus: 0 is not allowed"),
        (["--error", "0.1", "--division", "opened"], "division: 'opened' is not known, did you mean 'open'"),
        (["--seconds", "9", "--seconds-from", "nowhere"], "--seconds-from: 'nowhere/result.json': cannot be read"),
        (["--error", "0.1", "--hardware", "mi355x", "--seconds-from", "x"], "allowed: one of them"),
        (["--error", "0.1", "--division", "open", "--prompts", "0"], "--prompts: 0 is not allowed"),
        (["--error", "0.1", "--hardware", "mi355x", "--on", "tiny"], "--on 'tiny': its steps are not those of 'tiny'"),
        (["--error", "0.1", "--hardware", "mi355x", "--on", "none"], "recipe 'none': no such file"),
    ],
)
def test_bad_input_is_one_line(words: list[str], says: str) -> None:
    with pytest.raises(BadInput) as caught:
        command.main([*SMALL, *words])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def random_schedule(plan: Sequence[Step], kernels: Sequence[str], numbers: random.Random) -> choices.Schedule:
    """Any schedule: each computed step of any kernel, with or without guidance, followed by up to two that reuse its change."""
    attention: list[Any] = []
    off: list[int] = []
    reuse: list[int] = []
    guided_share, reuse_share = numbers.random(), 0.7 * numbers.random()
    while len(attention) < len(plan):
        first = len(attention)
        length = numbers.choice((1, 2)) if numbers.random() < reuse_share else 0
        while first + length >= len(plan) or plan[first + length].expert != plan[first].expert:
            length -= 1
        attention += [numbers.choice(kernels)] * (length + 1)
        reuse += range(first + 1, first + 1 + length)
        if numbers.random() > guided_share:
            off += range(first, first + 1 + length)
    return choices.Schedule(attention=tuple(attention), off=tuple(off), reuse=tuple(reuse), factors=(1.0,) * len(reuse))


@pytest.mark.slow
def test_predicted_errors_rank_random_schedules_of_the_embedded_model() -> None:
    """Spearman's correlation of predicted and measured errors over 24 random schedules is at least 0.9."""
    recipe = load_recipe("tiny", overrides=["model.dtype=float32", "mesh.ranks=1", "workload.steps=10"])
    prompts, _ = prompts_of(recipe, 2)
    kernels: tuple[Any, ...] = ("sdpa", "sage_fp8", "sage_fp4")
    bench = measure.Bench(recipe, prompts, Watch(Faults()), kernels=kernels, batch=2)
    base = choices.exact(10)
    bench.pipeline(base.formats())
    plan = bench.plan(base)
    options = choices.Options(attention=(kernels,) * 10, formats=(("bf16", "bf16"),), skip=True)
    reference = bench.run(base, name="exact")
    assert reference is not None

    def difference(schedule: choices.Schedule) -> Any:
        made = bench.run(schedule, name="trial")
        assert made is not None
        return measure.difference(made.latents, reference.latents)

    errors = choices.Errors.from_trials(
        plan, options, {name: difference(trial) for name, trial in choices.trials(plan, options).items()}
    )
    numbers = random.Random(3)
    predicted, measured = [], []
    for _ in range(24):
        schedule = random_schedule(plan, kernels, numbers)
        predicted.append(errors.square(errors.of(schedule, plan)))
        vector = difference(schedule)
        measured.append(float(vector @ vector))
    assert scipy.stats.spearmanr(predicted, measured).statistic >= 0.9
