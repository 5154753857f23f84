"""The benchmark: `python -m wan_mlperf.run --scenario singlestream` starts the ranks; under torchrun it is a rank.

Only wiring: check everything, load the pipeline, let LoadGen ask, write the run folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from wan_mlperf import cli
from wan_mlperf.errors import choose


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return the exit code: 0 VALID, 1 INVALID."""
    started = time.perf_counter()
    options = parse(arguments)
    from sut import loadgen, prompts, run_record
    from wan_mlperf import checkpoint, pipeline, step_plan, text_encoder
    from wan_mlperf.files import writable_folder
    from wan_mlperf.kernels import device, gemm
    from wan_mlperf.parallel import mesh

    choose("scenario", options.scenario, loadgen.SCENARIOS)
    choose("mode", options.mode, loadgen.MODES)
    recipe = cli.recipe_from(options, scenario=options.scenario)
    workload = recipe.effective_workload
    if options.explain:
        return explain(recipe)
    outputs = writable_folder(Path(options.outputs), what="output folder")
    samples = prompts.read_prompts(options.prompts)
    settings = loadgen.make_settings(options.scenario, options.mode, recipe.user_conf_path, len(samples))
    found = checkpoint.find(recipe.model.checkpoint)
    tokenizer = found.load_tokenizer()
    for number, prompt in enumerate(samples, start=1):
        text_encoder.check_prompt(tokenizer, prompt, what=f"prompt {number}")
    text_encoder.check_prompt(tokenizer, workload.negative_prompt, what="negative prompt")
    gemm.check(recipe.gemm, device.probe(), allow_reference=recipe.references == "allow")
    step_plan.make_plan(recipe, workload, found.config("scheduler"))
    ranks = mesh.environment()[1] if mesh.under_torchrun() else mesh.ranks_to_start(recipe.mesh)
    pipeline.plan_shape(recipe, workload, found, world=ranks)
    if not mesh.under_torchrun():
        return cli.launch("wan_mlperf.run", arguments, ranks)

    engine = pipeline.Pipeline.load(recipe)
    engine.warm_up(recipe.warmup_queries)
    from sut.dispatch import Lockstep
    from sut.system import System

    dispatcher = Lockstep(engine)
    if not engine.mesh.is_replica_first:
        dispatcher.serve()
        engine.mesh.close()
        return cli.DONE

    folder = run_record.make_folder(outputs, options.scenario, options.mode)
    run_record.write_inputs(folder, engine)
    videos = None
    if options.mode == "accuracy":
        videos = folder / "videos"
        videos.mkdir()
        run_record.write_prompts(folder, samples)
    print(f"{recipe.name}: {engine.mesh.shape}, {engine.mesh.device.name}; {'; '.join(engine.load_summary)}", flush=True)
    start_s = time.perf_counter() - started
    total = loadgen.expected_queries(settings, options.scenario, options.mode, len(samples))
    progress = cli.Progress(f"{options.scenario} {options.mode}", total)

    def on_failure(index: int, error: BaseException) -> None:
        stage = engine.spans.current
        print(f"failed: rank 0, stage {stage}, sample {index}: {type(error).__name__}: {cli.one_line(error)}", file=sys.stderr)
        cli.leave(cli.FAILED)

    system = System(dispatcher, samples, fps=workload.fps, videos=videos, on_sample=progress.advance, on_failure=on_failure)
    loadgen.run(settings, folder=folder, samples=len(samples), issue=system.issue, flush=system.flush)
    progress.close()
    dispatcher.stop()
    result = run_record.write_result(
        folder,
        engine,
        scenario=options.scenario,
        mode=options.mode,
        spans=system.spans,
        generate_s=system.generate_s,
        start_s=start_s,
    )
    run_record.point_latest(folder)
    run_record.print_summary(result, folder)
    engine.mesh.close()
    return cli.DONE if result["valid"] else cli.INVALID


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="python -m wan_mlperf.run", description=__doc__)
    parser.add_argument("--scenario", default="singlestream", help="singlestream or offline")
    parser.add_argument("--mode", default="performance", help="performance or accuracy")
    cli.add_recipe_arguments(parser)
    parser.add_argument("--prompts", metavar="FILE", help="one prompt a line (default: the benchmark's 248)")
    parser.add_argument("--outputs", default="outputs", metavar="FOLDER", help="where the run folder is made")
    parser.add_argument("--explain", action="store_true", help="print the step plan and stop; reads no weights")
    return parser.parse_args(arguments)


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
