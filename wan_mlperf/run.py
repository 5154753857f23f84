"""The benchmark: `python -m wan_mlperf.run --scenario singlestream` starts the ranks; under torchrun it is a rank.

Only wiring: check everything, load the pipeline, let LoadGen ask, write the run folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from wan_mlperf import cli, process, ranks
from wan_mlperf.errors import BadInput, choose

if TYPE_CHECKING:  # imported when it is needed: --help and a misspelt flag must not wait for torch
    from wan_mlperf.recipe import Recipe


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return the exit code: 0 VALID, 1 INVALID."""
    started = time.perf_counter()
    options = parse(arguments)
    from sut import accuracy_log, compliance, loadgen, prompts, run_record, session
    from wan_mlperf import preflight
    from wan_mlperf.files import writable_folder
    from wan_mlperf.parallel.launch import launch
    from wan_mlperf.recipe import to_yaml
    from wan_mlperf.replicas.watch import Watch
    from wan_mlperf.report import run_folder

    choose("scenario", options.scenario, loadgen.SCENARIOS)
    choose("mode", options.mode, loadgen.MODES)
    recipe = preflight.recipe_from(options, scenario=options.scenario)
    if options.explain:
        return explain(recipe)
    outputs = writable_folder(Path(options.outputs), what="output folder")
    samples = prompts.prompt_set(options.prompts)
    if options.mode == "accuracy" and ranks.is_first():
        accuracy_log.check_space(outputs, recipe.effective_workload, len(samples))
    settings = loadgen.make_settings(options.scenario, options.mode, recipe.user_conf_path, len(samples))
    reference = None
    if options.test04:
        identity = {"recipe_yaml": to_yaml(recipe), "commit": run_record.commit()}
        reference = compliance.find_reference(outputs, options.reference, scenario=options.scenario, **identity)
    setup = preflight.prepare(recipe, prompts=samples, world=preflight.ranks_for(recipe))
    if options.scenario == "singlestream" and setup.shape.replicas > 1:
        raise BadInput(f"mesh.replicas: {setup.shape} with scenario singlestream; allowed: 1, as one query is asked at a time")
    if not ranks.under_torchrun():
        return launch("wan_mlperf.run", arguments, setup.shape.world)
    test = session.Test(
        scenario=options.scenario,
        mode=options.mode,
        settings=settings,
        prompts=samples,
        outputs=outputs,
        audit=compliance.AUDIT if options.test04 else None,
        reference=reference,
        keep_accuracy_log=options.keep_accuracy_log,
        started=started,
    )
    with Watch(recipe.faults) as watch:
        return session.run(test, setup, watch, on_finished=run_folder.write)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="python -m wan_mlperf.run", description=__doc__)
    parser.add_argument("--scenario", default="singlestream", help="singlestream or offline")
    parser.add_argument("--mode", default="performance", help="performance or accuracy")
    cli.add_recipe_arguments(parser)
    parser.add_argument("--prompts", metavar="FILE", help="one prompt a line (default: the benchmark's 248)")
    parser.add_argument("--outputs", default="outputs", metavar="FOLDER", help="where the run folder is made")
    parser.add_argument("--test04", action="store_true", help="MLCommons' audit: is anything cached? After a performance run")
    parser.add_argument("--reference", metavar="FOLDER", help="with --test04: the performance run (default: the newest)")
    parser.add_argument(
        "--keep-accuracy-log", action="store_true", help="keep LoadGen's whole accuracy log (111 GB), not its ends"
    )
    parser.add_argument("--explain", action="store_true", help="print the step plan and stop; reads no weights")
    options = parser.parse_args(arguments)
    if options.test04 and options.mode != "performance":
        raise BadInput(f"--test04 with --mode {options.mode!r}; allowed: --mode performance, the default")
    if options.reference is not None and not options.test04:
        raise BadInput(f"--reference {options.reference!r} has no effect; allowed: only together with --test04")
    if options.keep_accuracy_log and options.mode != "accuracy":
        raise BadInput("--keep-accuracy-log has no effect; allowed: only together with --mode accuracy")
    return options


def explain(recipe: Recipe) -> int:
    """Print the plan without the checkpoint: its scheduler's settings are Wan2.2's published ones."""
    from wan_mlperf import step_plan

    plan = step_plan.make_plan(recipe, recipe.effective_workload)
    if ranks.is_first():
        Console(width=None if sys.stdout.isatty() else 110).print(step_plan.as_table(plan, title=recipe.name))
    return process.DONE


if __name__ == "__main__":
    process.entry(main)
