"""A prompt -> an MP4: `python -m wan_mlperf.generate "a red circle moving left" -o circle.mp4`.

With --prompts, a list of prompts -> a folder of MP4s, over all replicas. It can be stopped and started again at any moment.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wan_mlperf import cli, process, ranks
from wan_mlperf.errors import BadInput, Failed

if TYPE_CHECKING:  # imported when they are needed: --help and a misspelt flag must not wait for torch
    import numpy as np
    import torch

    from wan_mlperf.generate.video_list import VideoList
    from wan_mlperf.pipeline import Pipeline
    from wan_mlperf.preflight import Setup
    from wan_mlperf.replicas.dispatch import FinishedSample
    from wan_mlperf.replicas.replica import LatentCheck
    from wan_mlperf.replicas.watch import Watch
    from wan_mlperf.step_plan import Step

COLLECTIVE_S = 24 * 3600.0  # as in sut/session.py: the watch finds a rank that hangs


def main(arguments: Sequence[str]) -> int:
    """Make the video or videos and return the exit code."""
    options = parse(arguments)
    cli.check_recipe(options)
    from wan_mlperf import preflight
    from wan_mlperf.parallel.launch import launch
    from wan_mlperf.pipeline import Pipeline
    from wan_mlperf.replicas import together
    from wan_mlperf.replicas.watch import Watch

    together.streams([options.recipe, options.prompts])
    with together.checks():
        asked = check(options)
    if isinstance(asked, int):
        return asked
    setup, prompts, videos = asked
    world = preflight.ranks_for(setup.recipe)
    if not ranks.under_torchrun() and world > 1:
        return launch("wan_mlperf.generate", arguments, world)
    with Watch(setup.recipe.faults) as watch:
        engine = Pipeline.load(setup, timeout_s=COLLECTIVE_S)
        watch.follow(engine.spans)
        if ranks.is_first():
            process.say(f"{setup.recipe.name}: {engine.mesh.shape}, {engine.mesh.device}")
        if options.prompts is None:
            make_one(engine, options.prompt, Path(options.output))
            code = process.DONE
        else:
            code = make_list(engine, watch, prompts, videos)
        engine.mesh.close()
    return code


def check(options: argparse.Namespace) -> tuple[Setup, list[str], VideoList | None] | int:
    """Check everything that can be refused before a weight is read. Returns the exit code if there is nothing more to do."""
    from wan_mlperf import preflight, video
    from wan_mlperf.files import writable_folder
    from wan_mlperf.generate.video_list import VideoList
    from wan_mlperf.inputs.text import read_prompts
    from wan_mlperf.recipe import replace_workload
    from wan_mlperf.videos.manifest import identity

    recipe = preflight.recipe_from(options, scenario="singlestream" if options.prompts is None else "offline")
    workload = replace_workload(recipe.effective_workload, **changes(options))
    prompts = [options.prompt] if options.prompts is None else read_prompts(options.prompts)
    if options.explain:
        command = {"prompts": prompts, "output": options.output, "force": options.force}
        return cli.explain(recipe, workload, command, as_json=options.json)
    video.check_encoder()
    output = Path(options.output)
    if options.prompts is None:
        check_output(output, options.force)
    else:
        writable_folder(output, what="output folder")
    setup = preflight.prepare(recipe, workload=workload, prompts=prompts, world=preflight.ranks_for(recipe))
    if options.prompts is None:
        if setup.shape.replicas > 1:
            raise BadInput(f"mesh.replicas: {setup.shape.replicas} for one prompt; allowed: 1, or --prompts FILE")
        return setup, prompts, None
    videos = None
    if ranks.is_first():
        known = identity(recipe, workload, setup.checkpoint)
        videos = VideoList(output, prompts, seed=workload.seed, recipe=known, force=options.force, locked=not options.no_lock)
        if not ranks.under_torchrun() and not videos.missing():
            process.tell(f"{output}: all {len(prompts)} videos exist")
            return process.DONE
    return setup, prompts, videos


def make_one(engine: Pipeline, prompt: str, output: Path) -> None:
    """On every rank: make one video. The first rank writes it, frame by frame as it is decoded."""
    from wan_mlperf.replicas.replica import LatentCheck
    from wan_mlperf.video import write_mp4_in_background

    started = time.perf_counter()
    progress = cli.Progress("denoising", engine.workload.steps)
    check = LatentCheck()

    def on_step(step: Step, latents: torch.Tensor) -> None:
        check.see(step, latents)
        progress.advance()

    chunks = engine.stream_batch([prompt], on_step=on_step)
    if engine.mesh.is_replica_first:
        write_mp4_in_background(output, checked(chunks, check), engine.workload.fps)
        progress.close()
        report(output, engine.spans.take(), time.perf_counter() - started)
    else:
        for _ in chunks:
            pass


def make_list(engine: Pipeline, watch: Watch, prompts: Sequence[str], videos: VideoList | None) -> int:
    """On every rank: make the videos that do not exist yet. `videos` is given on the first rank. Returns the exit code."""
    from wan_mlperf.replicas import dispatch
    from wan_mlperf.replicas.messages import Job
    from wan_mlperf.video import to_mp4

    missing = []
    if videos is not None:
        videos.lock()
        missing = videos.missing()
    engine.warm_up(engine.recipe.warmup_queries, batch=engine.recipe.offline.batch)
    dispatcher = dispatch.start(engine, watch, pack=lambda frames: to_mp4(frames, engine.workload.fps))
    if videos is None:
        dispatcher.serve()
        return process.DONE

    progress = cli.Progress("videos", len(missing))
    lost: list[str] = []
    finished = threading.Event()

    def one_less() -> None:
        progress.advance()
        if progress.done == len(missing):
            finished.set()

    def on_result(result: FinishedSample) -> None:
        assert videos is not None
        videos.add(result.job.sample, bytes(result.content))
        one_less()

    def on_lost(job: Job, reason: str) -> None:
        lost.append(f"failed: prompt {job.sample + 1}: {reason}")
        one_less()

    def work() -> None:
        dispatcher.submit([Job(ticket=ticket, sample=number, prompt=prompts[number]) for ticket, number in enumerate(missing)])
        if missing:
            finished.wait()

    dispatcher.on_result, dispatcher.on_lost = on_result, on_lost
    watch.on_end = lambda _reason: progress.close()
    dispatcher.run(work)
    videos.unlock()
    progress.close()
    for line in lost:
        process.say(line)
    process.tell(f"{videos.folder}: {len(missing) - len(lost)} made, {len(prompts) - len(missing)} existed, {len(lost)} failed")
    return process.FAILED if lost else process.DONE


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="python -m wan_mlperf.generate", description=__doc__)
    parser.add_argument("prompt", nargs="?")
    parser.add_argument(
        "--prompts",
        type=cli.path,
        metavar="FILE",
        help="make one video per line of a text file; continues after a stop",
    )
    parser.add_argument(
        "-o", "--output", type=cli.path, metavar="PATH", help="the MP4 (default: video.mp4); with --prompts the folder (videos)"
    )
    parser.add_argument("--force", action="store_true", help="replace videos that exist or were made differently")
    parser.add_argument("--seed", type=int, help="seed of the initial noise (default: the workload's, 42)")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--size", metavar="HEIGHTxWIDTH", help="pixels, multiples of 16, such as 720x1280")
    parser.add_argument("--frames", type=int, help="video frames, 4 n + 1")
    parser.add_argument("--negative", metavar="PROMPT", help="negative prompt (default: the benchmark's)")
    cli.add_recipe_arguments(parser)
    parser.add_argument("--no-lock", action="store_true", help="with --prompts: continue even if the file system has no locks")
    parser.add_argument("--explain", action="store_true", help="print the step plan and stop; reads no weights")
    parser.add_argument("--json", action="store_true", help="with --explain: print everything that was understood, as JSON")
    options = parser.parse_args(arguments)
    if (options.prompt is None) == (options.prompts is None):
        raise BadInput("prompt: allowed: either a prompt or --prompts FILE")
    if options.json and not options.explain:
        raise BadInput("--json has no effect; allowed: only together with --explain")
    options.output = options.output or ("video.mp4" if options.prompts is None else "videos")
    return options


def changes(options: argparse.Namespace) -> dict[str, object]:
    """Return what the flags change in the workload. Raises BadInput."""
    more = {"seed": options.seed, "negative_prompt": options.negative}
    return cli.workload_changes(options.size, steps=options.steps, frames=options.frames, **more)


def check_output(path: Path, force: bool) -> Path:
    """Check that the file can be written and does not exist yet. Raises BadInput."""
    from wan_mlperf.files import writable_file, writable_folder
    from wan_mlperf.inputs.paths import look

    if path.suffix.lower() != ".mp4":
        raise BadInput(f"--output: {str(path)!r} is not allowed; allowed: a name that ends in .mp4")
    if look(path, what="--output") is not None and not force:
        raise BadInput(f"--output: {str(path)!r} exists; allowed: another name, or --force")
    writable_folder(path.parent, what="output folder")
    return writable_file(path, what="--output")


def checked(chunks: Iterator[np.ndarray], check: LatentCheck) -> Iterator[np.ndarray]:
    """Chunks [1, n, height, width, 3] -> [n, height, width, 3]. Raises Failed at the end if the frames are not a video."""
    from wan_mlperf.replicas.replica import flat

    is_flat = True
    for chunk in chunks:
        is_flat = is_flat and flat(chunk[0])
        yield chunk[0]
    problem = check.problems(1)[0] or ("every frame is of one colour" if is_flat else None)
    if problem:
        raise Failed(problem)


def report(output: Path, spans: dict[str, float], seconds: float) -> None:
    """Say where the file is and how long each stage took."""
    stages = ", ".join(f"{stage.replace('_', ' ')} {value:.2f} s" for stage, value in spans.items())
    process.tell(f"{output}: {seconds:.2f} s ({stages})")


if __name__ == "__main__":
    process.entry(main)
