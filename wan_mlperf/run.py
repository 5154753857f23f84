"""The benchmark: `python -m wan_mlperf.run --scenario singlestream` starts the ranks; under torchrun it is a rank.

Only wiring: check everything, load the pipeline, let LoadGen ask, write the run folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from wan_mlperf import cli
from wan_mlperf.errors import BadInput, choose

if TYPE_CHECKING:  # imported when they are needed: --help and a misspelt flag must not wait for torch
    from wan_mlperf.parallel.messages import Job
    from wan_mlperf.parallel.watch import Watch
    from wan_mlperf.recipe import Recipe

COLLECTIVE_S = 24 * 3600.0  # how long a collective may wait: finding a rank that hangs is the watch's task, and sooner


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return the exit code: 0 VALID, 1 INVALID."""
    started = time.perf_counter()
    options = parse(arguments)
    from sut import compliance, loadgen, prompts, run_record
    from wan_mlperf import pipeline
    from wan_mlperf.files import writable_folder
    from wan_mlperf.parallel import mesh
    from wan_mlperf.parallel.watch import Watch
    from wan_mlperf.recipe import to_yaml

    choose("scenario", options.scenario, loadgen.SCENARIOS)
    choose("mode", options.mode, loadgen.MODES)
    recipe = cli.recipe_from(options, scenario=options.scenario)
    workload = recipe.effective_workload
    if options.explain:
        return explain(recipe)
    outputs = writable_folder(Path(options.outputs), what="output folder")
    samples = prompts.read_prompts(options.prompts)
    settings = loadgen.make_settings(options.scenario, options.mode, recipe.user_conf_path, len(samples))
    reference = None
    if options.test04:
        identity = {"recipe_yaml": to_yaml(recipe), "commit": run_record.commit()}
        reference = compliance.find_reference(outputs, options.reference, scenario=options.scenario, **identity)
    ranks = mesh.environment()[1] if mesh.under_torchrun() else mesh.ranks_to_start(recipe.mesh)
    found = pipeline.check(recipe, workload, prompts=samples, world=ranks)
    shape = pipeline.plan_shape(recipe, workload, found, world=ranks)
    if options.scenario == "singlestream" and shape.replicas > 1:
        raise BadInput(f"mesh.replicas: {shape} with scenario singlestream; allowed: 1, as one query is asked at a time")
    if not mesh.under_torchrun():
        return cli.launch("wan_mlperf.run", arguments, ranks)
    with Watch(recipe.faults) as watch:
        return measure(options, recipe, samples, settings, watch, outputs=outputs, reference=reference, started=started)


def measure(
    options: argparse.Namespace,
    recipe: Recipe,
    samples: Sequence[str],
    settings: Any,
    watch: Watch,
    *,
    outputs: Path,
    reference: Any,
    started: float,
) -> int:
    """On every rank: load, and work until LoadGen has its answers; on rank 0 also ask LoadGen and write the run folder."""
    from sut import compliance, loadgen, run_record
    from sut.system import System, packer
    from wan_mlperf import pipeline, report
    from wan_mlperf.parallel import dispatch

    audit = compliance.AUDIT if options.test04 else None
    engine = pipeline.Pipeline.load(recipe, timeout_s=COLLECTIVE_S)
    watch.follow(engine.spans)
    engine.warm_up(recipe.warmup_queries)
    dispatcher = dispatch.start(engine, watch, pack=packer(options.mode, recipe.effective_workload.fps))
    if engine.mesh.rank:
        dispatcher.serve()
        engine.mesh.close()
        return cli.DONE

    folder = run_record.make_folder(outputs, options.scenario, "test04" if audit else options.mode)
    run_record.write_inputs(folder, engine)
    videos = None
    if options.mode == "accuracy":
        videos = folder / "videos"
        videos.mkdir()
        run_record.write_prompts(folder, samples)
    print(f"{recipe.name}: {engine.mesh.shape}, {engine.mesh.device.name}; {'; '.join(engine.load_summary)}", flush=True)
    start_s = time.perf_counter() - started
    total = loadgen.expected_queries(settings, options.scenario, options.mode, len(samples), audit)
    progress = cli.Progress(f"{options.scenario} {options.mode}", total)

    def write_result(*, stopped: str | None = None, compliance: Any = None) -> dict[str, Any]:
        return run_record.write_result(
            folder,
            engine,
            prompts=samples,
            compliance=compliance,
            scenario=options.scenario,
            mode=options.mode,
            spans=system.spans,
            generate_s=system.generate_s,
            start_s=start_s,
            stopped=stopped,
        )

    def on_lost(job: Job, reason: str) -> None:
        # LoadGen waits for this response for ever and must not get a false one: the run ends here, with what is done kept.
        watch.end(f"INVALID: sample {job.sample} failed {job.attempt} times: {reason}; see {folder}", cli.INVALID)

    system = System(dispatcher, samples, videos=videos, on_sample=progress.advance, on_lost=on_lost, on_failure=watch.fail)

    def on_end(reason: str) -> None:
        progress.close()
        write_result(stopped=reason)

    watch.on_end = on_end
    dispatcher.run(
        lambda: loadgen.run(settings, folder=folder, samples=len(samples), issue=system.issue, flush=system.flush, audit=audit)
    )
    progress.close()
    verdict = compliance.verify(folder, reference) if reference else None
    result = write_result(compliance=verdict)
    watch.on_end = lambda _reason: None
    run_record.point_latest(folder)
    report.write(folder)
    run_record.print_summary(result, folder)
    engine.mesh.close()
    return cli.DONE if result["valid"] and (verdict is None or verdict["passed"]) else cli.INVALID


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
    parser.add_argument("--explain", action="store_true", help="print the step plan and stop; reads no weights")
    options = parser.parse_args(arguments)
    if options.test04 and options.mode != "performance":
        raise BadInput(f"--test04 with --mode {options.mode!r}; allowed: --mode performance, the default")
    if options.reference is not None and not options.test04:
        raise BadInput(f"--reference {options.reference!r} has no effect; allowed: only together with --test04")
    return options


def explain(recipe: object) -> int:
    """Print the plan without the checkpoint: its scheduler's settings are Wan2.2's published ones."""
    from wan_mlperf import step_plan
    from wan_mlperf.recipe import Recipe

    assert isinstance(recipe, Recipe)
    plan = step_plan.make_plan(recipe, recipe.effective_workload)
    if cli.is_first_rank():
        Console(width=None if sys.stdout.isatty() else 110).print(step_plan.as_table(plan, title=recipe.name))
    return cli.DONE


if __name__ == "__main__":
    cli.entry(main)
