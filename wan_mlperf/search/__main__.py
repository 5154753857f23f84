"""Find the best schedule: `python -m wan_mlperf.search --recipe mi355x-singlestream --hardware mi355x --gpus 8 --seconds 14`.

It measures the error of every choice alone, once, on the recipe's own model; the results are kept, so a search that was stopped
continues. It prices each choice, finds the schedule with the least error for the given seconds (or forward passes), or the
cheapest one for a given error, and runs the best ones from end to end. It writes the recipe it found, and a page with everything.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wan_mlperf import cli, process, ranks
from wan_mlperf.errors import BadInput, choose

if TYPE_CHECKING:  # imported when they are needed: --help and a misspelt flag must not wait for torch
    from wan_mlperf.preflight import Setup
    from wan_mlperf.search.search import Job

DIVISIONS = ("closed", "open")


def main(arguments: Sequence[str]) -> int:
    """Search, and return the exit code."""
    options = parse(arguments)
    cli.check_recipe(options)
    from wan_mlperf.parallel.launch import launch
    from wan_mlperf.replicas import together
    from wan_mlperf.replicas.watch import Watch
    from wan_mlperf.search import search

    together.streams([options.recipe, options.on])
    with together.checks():
        job, setup = check(options, arguments)
    if not ranks.under_torchrun() and setup.shape.world > 1:
        return launch("wan_mlperf.search", arguments, setup.shape.world)
    with Watch(setup.recipe.faults) as watch:
        search.run(job, setup, watch)
    return process.DONE


def check(options: argparse.Namespace, arguments: Sequence[str]) -> tuple[Job, Setup]:
    """Check everything that can be refused before a weight is read. The setup is that of the model which is measured."""
    from wan_mlperf import preflight
    from wan_mlperf.files import writable_folder
    from wan_mlperf.recipe import load_recipe
    from wan_mlperf.search import prices, search
    from wan_mlperf.step_plan import make_plan

    recipe = preflight.recipe_from(options)
    measured = recipe if options.on is None else load_recipe(options.on)
    setup = preflight.prepare(measured, world=preflight.ranks_for(measured))
    plan = setup.plan if options.on is None else make_plan(recipe, recipe.effective_workload)
    if [step.expert for step in plan] != [step.expert for step in setup.plan]:
        raise BadInput(
            f"--on {options.on!r}: its steps are not those of {recipe.name!r}; allowed: as many, with the same experts"
        )
    if options.hardware is not None:
        pricing = prices.on_hardware(recipe, options.hardware, options.gpus)
    elif options.seconds_from is not None:
        pricing = prices.of_run(recipe, Path(options.seconds_from), plan)
    else:
        pricing = prices.by_forwards()
    job = search.Job(
        recipe=recipe,
        plan=plan,
        pricing=pricing,
        cost=options.seconds if options.forwards is None else options.forwards,
        error=options.error,
        skip=options.division == "open",
        worst_edge=options.worst_edge,
        prompts=options.prompts,
        finalists=options.finalists,
        output=writable_folder(Path(options.output), what="output folder"),
        command=" ".join(["python -m wan_mlperf.search", *arguments]),
    )
    return job, setup


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="python -m wan_mlperf.search", description=__doc__)
    cli.add_recipe_arguments(parser)
    parser.add_argument(
        "--on", type=cli.path, metavar="RECIPE", help="measure errors on this recipe's model and size, where its own cannot run"
    )
    parser.add_argument("--hardware", metavar="NAME", help="price the choices for this GPU, such as mi355x (see predict)")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="with --hardware: how many (default: 8)")
    parser.add_argument(
        "--seconds-from", type=cli.path, metavar="RUN", help="price them by the measured stages of a run folder of this recipe"
    )
    parser.add_argument("--division", default="closed", help="closed: precision only; open: also skip work (default: closed)")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="find the best schedule that takes at most S seconds per video"
    )
    parser.add_argument(
        "--forwards", type=float, metavar="N", help="find the best one with at most N forward passes of an expert"
    )
    parser.add_argument(
        "--error", type=float, metavar="E", help="find the cheapest one with at most this relative error of the latents"
    )
    parser.add_argument(
        "--worst-edge", type=float, default=0.1, metavar="E", help="the largest error that one reuse may have (default: 0.1)"
    )
    parser.add_argument("--prompts", type=int, default=6, metavar="N", help="how many prompts to measure on (default: 6)")
    parser.add_argument(
        "--finalists", type=int, default=6, metavar="N", help="how many schedules to run from end to end (default: 6)"
    )
    parser.add_argument(
        "-o", "--output", type=cli.path, default="outputs/search", metavar="FOLDER", help="where recipe and page go"
    )
    options = parser.parse_args(arguments)
    choose("division", options.division, DIVISIONS)
    goals = {"--seconds": options.seconds, "--forwards": options.forwards, "--error": options.error}
    if sum(value is not None for value in goals.values()) != 1:
        raise BadInput("allowed: one of --seconds, --forwards and --error")
    for name, value in {**goals, "--worst-edge": options.worst_edge}.items():
        if value is not None and not 0 < value < 1e9:
            raise BadInput(f"{name}: {value:g} is not allowed; allowed: above 0")
    for name, value in (("--prompts", options.prompts), ("--finalists", options.finalists), ("--gpus", options.gpus)):
        if value < 1:
            raise BadInput(f"{name}: {value} is not allowed; allowed: from 1")
    if options.hardware is not None and options.seconds_from is not None:
        raise BadInput("--hardware and --seconds-from; allowed: one of them")
    priced = options.hardware is not None or options.seconds_from is not None
    if priced != (options.forwards is None) and options.error is None:
        raise BadInput("allowed: --seconds with --hardware or --seconds-from, --forwards without either")
    if not priced and options.division == "closed":
        raise BadInput("--division closed: every schedule of it has the same forward passes; allowed: with --hardware, or open")
    return options


if __name__ == "__main__":
    process.entry(main)
