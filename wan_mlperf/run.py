"""The benchmark: `python -m wan_mlperf.run --scenario singlestream` starts the ranks; under torchrun it is a rank.

Only wiring: check everything, load the pipeline, let LoadGen ask, write the run folder.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wan_mlperf import cli, process, ranks
from wan_mlperf.errors import BadInput, choose

if TYPE_CHECKING:  # imported when it is needed: --help and a misspelt flag must not wait for torch
    from sut.session import Test
    from wan_mlperf.preflight import Setup


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return the exit code: 0 VALID, 1 INVALID."""
    started = time.perf_counter()
    options = parse(arguments)
    cli.check_recipe(options)
    from sut import session
    from wan_mlperf.parallel.launch import launch
    from wan_mlperf.replicas import together
    from wan_mlperf.replicas.watch import Watch
    from wan_mlperf.report import run_folder

    together.streams([options.recipe, options.prompts])
    with together.checks():
        asked = check(options, started)
    if isinstance(asked, int):
        return asked
    test, setup = asked
    if not ranks.under_torchrun():
        return launch("wan_mlperf.run", arguments, setup.shape.world)
    with Watch(setup.recipe.faults) as watch:
        return session.run(test, setup, watch, on_finished=run_folder.write)


def check(options: argparse.Namespace, started: float) -> tuple[Test, Setup] | int:
    """Check everything that can be refused before a weight is read. With --explain, show it and return the exit code."""
    from sut import accuracy_log, compliance, loadgen, prompts, run_record, session, user_conf
    from wan_mlperf import preflight, video
    from wan_mlperf.kernels.backends import ARCHS
    from wan_mlperf.recipe import to_yaml

    recipe = preflight.recipe_from(options, scenario=options.scenario)
    arch = None if options.arch is None else choose("--as", options.arch, ARCHS)
    if options.explain and not options.json and options.prompts is None:
        return cli.explain(recipe, recipe.effective_workload, {}, as_json=False, arch=arch)
    samples = prompts.prompt_set(options.prompts)
    settings = loadgen.make_settings(options.scenario, options.mode, recipe.user_conf_path, len(samples))
    conf = user_conf.read(recipe.user_conf_path)
    if said := conf.note():
        process.note(said)
    audit = compliance.AUDIT if options.test04 else None
    if audit is not None:
        compliance.check_samples(len(samples))
    if options.explain:
        command = {name: getattr(options, name) for name in ("scenario", "mode", "outputs", "test04", "reference")}
        command |= {"prompts": samples, "user_conf": dict(conf.values)}
        return cli.explain(recipe, recipe.effective_workload, command, as_json=options.json, arch=arch)
    if options.mode == "accuracy":
        video.check_encoder()
    outputs = run_record.check_outputs(Path(options.outputs))
    if options.mode == "accuracy" and ranks.is_first():
        accuracy_log.check_space(outputs, recipe.effective_workload, len(samples))
    reference = None
    if audit is not None:
        identity = {"recipe_yaml": to_yaml(recipe), "commit": run_record.commit()}
        reference = compliance.find_reference(outputs, options.reference, scenario=options.scenario, **identity)
    setup = preflight.prepare(recipe, prompts=samples, world=preflight.ranks_for(recipe))
    if options.scenario == "singlestream" and setup.shape.replicas > 1:
        raise BadInput(f"mesh.replicas: {setup.shape} with scenario singlestream; allowed: 1, as one query is asked at a time")
    test = session.Test(
        scenario=options.scenario,
        mode=options.mode,
        settings=settings,
        prompts=samples,
        outputs=outputs,
        audit=audit,
        reference=reference,
        keep_accuracy_log=options.keep_accuracy_log,
        started=started,
    )
    return test, setup


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    from sut import loadgen

    parser = cli.Parser(prog="python -m wan_mlperf.run", description=__doc__)
    parser.add_argument("--scenario", default="singlestream", help="singlestream or offline")
    parser.add_argument("--mode", default="performance", help="performance or accuracy")
    cli.add_recipe_arguments(parser)
    parser.add_argument(
        "--prompts", type=cli.path, metavar="FILE", help="a text file, one prompt per line (default: the benchmark's 248)"
    )
    parser.add_argument("--outputs", type=cli.path, default="outputs", metavar="FOLDER", help="where the run folder is made")
    parser.add_argument("--test04", action="store_true", help="MLCommons' audit: is anything cached? After a performance run")
    parser.add_argument(
        "--reference", type=cli.path, metavar="FOLDER", help="with --test04: the performance run (default: the newest)"
    )
    parser.add_argument(
        "--keep-accuracy-log", action="store_true", help="keep LoadGen's whole accuracy log (111 GB), not only its ends"
    )
    parser.add_argument("--explain", action="store_true", help="print the step plan and stop; reads no weights")
    parser.add_argument("--json", action="store_true", help="with --explain: print everything that was understood, as JSON")
    cli.add_arch_argument(parser, "with --explain: what would run on another GPU, and what of that is missing here")
    options = parser.parse_args(arguments)
    choose("scenario", options.scenario, loadgen.SCENARIOS)
    choose("mode", options.mode, loadgen.MODES)
    if options.arch is not None and not options.explain:
        raise BadInput(f"--as {options.arch!r} has no effect; allowed: only together with --explain")
    if options.test04 and options.mode != "performance":
        raise BadInput(f"--test04 with --mode {options.mode!r}; allowed: --mode performance, the default")
    if options.reference is not None and not options.test04:
        raise BadInput(f"--reference {options.reference!r} has no effect; allowed: only together with --test04")
    if options.keep_accuracy_log and options.mode != "accuracy":
        raise BadInput("--keep-accuracy-log has no effect; allowed: only together with --mode accuracy")
    if options.json and not options.explain:
        raise BadInput("--json has no effect; allowed: only together with --explain")
    return options


if __name__ == "__main__":
    process.entry(main)
