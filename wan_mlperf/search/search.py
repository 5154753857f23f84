"""The search itself, on every rank: measure, choose, run the best schedules, and write the results on rank 0."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from wan_mlperf.bench.fidelity import console, prompts_of
from wan_mlperf.files import atomic_write
from wan_mlperf.identity import commit, versions
from wan_mlperf.kernels.device import gpu_count
from wan_mlperf.preflight import Setup
from wan_mlperf.recipe import Recipe, to_yaml
from wan_mlperf.replicas.watch import Watch
from wan_mlperf.search import choices, programme, verify
from wan_mlperf.search.choices import Errors, Schedule
from wan_mlperf.search.measure import Bench, Ledger, measure
from wan_mlperf.search.page import write_page
from wan_mlperf.search.prices import Pricing
from wan_mlperf.search.programme import Point
from wan_mlperf.step_plan import Step, make_plan


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked: the least error within `cost` (of a whole video), or the least cost within `error`.

    `recipe` and `plan` are of the run that is planned; errors may be measured on another recipe's model.
    """

    recipe: Recipe
    plan: tuple[Step, ...]
    pricing: Pricing
    cost: float | None
    error: float | None
    skip: bool
    worst_edge: float
    prompts: int
    finalists: int
    output: Path
    command: str

    @property
    def division(self) -> str:
        """The MLPerf division that the schedules belong to."""
        return "open" if self.skip else "closed"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found. `chosen` is the answer, `own` the recipe's own schedule, `points` the front, cheapest first."""

    chosen: Point
    own: Point
    points: list[Point]
    outcomes: list[verify.Outcome]
    correlation: float | None
    band: tuple[float, float] | None


def run(job: Job, setup: Setup, watch: Watch) -> None:
    """Search, on every rank. Raises BadInput if no schedule meets the goal."""
    measured = _measured_recipe(setup.recipe)
    prompts, scenes = prompts_of(measured, job.prompts)
    own = choices.of_recipe(job.recipe, job.plan)
    options = job.pricing.options(own, skip=job.skip)
    trials = choices.trials(job.plan, options)
    kernels = tuple(dict.fromkeys((choices.EXACT_ATTENTION, *(name for step in options.attention for name in step))))
    batch = len(prompts) if scenes else 1
    bench = Bench(measured, prompts, watch, kernels=kernels, batch=batch, verified=setup.checkpoint)
    mesh = bench.pipeline(choices.exact(len(job.plan)).formats()).mesh
    ledger = Ledger(_identity(measured, setup, prompts))
    measure(bench, trials, ledger, steps=len(job.plan))
    errors = Errors.from_trials(job.plan, options, {name: ledger.read(name) for name in trials})
    points = programme.front(job.plan, options, errors, job.pricing.step, worst_edge=job.worst_edge)
    chosen = programme.choose(points, cost=None if job.cost is None else job.cost - job.pricing.fixed, error=job.error)
    plan = _plan(job, own, setup)
    own_point = Point(cost=sum(map(job.pricing.step, plan)), square=_own_square(own, job, errors), schedule=own)
    finalists = {"found": chosen} | {f"front {number}": point for number, point in enumerate(_spread(points, job.finalists - 1))}
    if own_point.square == own_point.square:  # a recipe whose own choices were measured
        finalists["the recipe as it is"] = own_point
    outcomes = verify.run(
        bench,
        {name: (one.schedule, one.cost + job.pricing.fixed, one.error) for name, one in finalists.items()},
        scenes,
        steps=len(job.plan),
    )
    if mesh.rank == 0:
        found = Found(
            chosen=chosen,
            own=own_point,
            points=points,
            outcomes=outcomes,
            correlation=verify.rank_correlation(outcomes),
            band=job.pricing.band(_plan(job, chosen.schedule, setup)),
        )
        _write(job, found, {name: float(ledger.read(name) @ ledger.read(name)) for name in trials})
    bench.close()


def _measured_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe to measure errors with. Without a GPU it is in fp32, because bf16's rounding would hide small errors."""
    changes: dict[str, Any] = {"trim_text": recipe.trim_text}
    if not gpu_count():
        changes["model"] = dataclasses.replace(recipe.model, dtype="float32")
    return dataclasses.replace(recipe, **changes)


def _identity(recipe: Recipe, setup: Setup, prompts: Sequence[str]) -> dict[str, object]:
    """Return everything that a trial's error depends on."""
    return {
        "model": setup.checkpoint.identity,
        "dtype": recipe.model.dtype,
        "trim_text": recipe.trim_text,
        "workload": dataclasses.asdict(setup.workload),
        "noise": recipe.model.fixed_latent,
        "prompts": list(prompts),
        "versions": {name: versions().get(name) for name in ("torch", "diffusers", "xfuser", "torchao")},
    }


def _plan(job: Job, schedule: Schedule, setup: Setup) -> tuple[Step, ...]:
    recipe = schedule.in_recipe(job.recipe)
    return make_plan(recipe, recipe.effective_workload, setup.checkpoint.config("scheduler"))


def _own_square(own: Schedule, job: Job, errors: Errors) -> float:
    try:
        return errors.square(errors.of(own, job.plan))
    except KeyError:
        return float("nan")  # it has a kernel or format without a price, so without a trial


def _spread(points: Sequence[Point], count: int) -> list[Point]:
    """Return `count` points spread evenly over the front."""
    return (
        [points[index] for index in sorted({round(one) for one in np.linspace(0, len(points) - 1, count)})] if count > 0 else []
    )


def _write(job: Job, found: Found, squares: dict[str, float]) -> None:
    # The file is not in the folder of the recipe that it came from, to which user.conf is relative.
    user_conf = str(job.recipe.user_conf_path.resolve())
    recipe = found.chosen.schedule.in_recipe(job.recipe, name=f"{job.recipe.name}-found", user_conf=user_conf)
    head = [
        f"# Found by: {job.command}",
        f"# on {date.today().isoformat()}, commit {commit()}; division {job.division}; "
        f"predicted error {found.chosen.error:.4f}, {found.chosen.cost + job.pricing.fixed:.4g} {job.pricing.unit} "
        f"({job.pricing.source})",
    ]
    atomic_write(job.output / "recipe.yaml", "\n".join(head) + "\n" + to_yaml(recipe))
    record = {
        "command": job.command,
        "commit": commit(),
        "versions": versions(),
        "division": job.division,
        "prices": job.pricing.source,
        "unit": job.pricing.unit,
        "band": found.band,
        "chosen": _point_json(job, found.chosen),
        "own": _point_json(job, found.own),
        "front": [_point_json(job, point) for point in found.points],
        "outcomes": [one.as_json() for one in found.outcomes],
        "spearman": found.correlation,
        "squares": squares,
    }
    atomic_write(job.output / "search.json", json.dumps(record, indent=1))
    write_page(job.output / "search.html", record, job.plan)
    _print(job, found)


def _point_json(job: Job, point: Point) -> dict[str, object]:
    return {
        "cost": point.cost + job.pricing.fixed,
        "error": point.error,
        "schedule": dataclasses.asdict(point.schedule),
    }


def _print(job: Job, found: Found) -> None:
    unit = job.pricing.unit
    table = Table(title=f"{job.recipe.name}, {job.division} division, {job.pricing.source}")
    for heading in ("", unit, "predicted error", "measured", "PSNR dB", "SSIM"):
        table.add_column(heading, justify="left" if not heading else "right")
    for one in found.outcomes:
        figures = (f"{one.cost:.4g}", f"{one.predicted:.4f}", f"{one.measured:.4f}", f"{one.psnr:.1f}", f"{one.ssim:.4f}")
        table.add_row(one.name, *figures)
    console().print(table)
    if found.correlation is not None:
        print(f"rank correlation of predicted and measured errors (Spearman): {found.correlation:.2f}")
    if found.band is not None:
        print(f"found: between {found.band[0]:.1f} and {found.band[1]:.1f} s, by the prediction's band")
    print(f"recipe: {job.output / 'recipe.yaml'}; all that was found: {job.output / 'search.html'}")
