"""A prompt -> an MP4: `python -m wan_mlperf.generate "a red circle moving left" -o circle.mp4`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wan_mlperf import cli
from wan_mlperf.errors import BadInput


def main(arguments: Sequence[str]) -> int:
    """Make the video and return the exit code."""
    options = parse(arguments)
    from wan_mlperf import checkpoint, pipeline, text_encoder
    from wan_mlperf.kernels import device, gemm
    from wan_mlperf.parallel import mesh
    from wan_mlperf.recipe import replace_workload

    recipe = cli.recipe_from(options)
    workload = replace_workload(recipe.effective_workload, **changes(options))
    output = check_output(Path(options.output), options.force)
    if not options.prompt.strip():
        raise BadInput(f"prompt: {options.prompt!r} is empty; allowed: some text")
    found = checkpoint.find(recipe.model.checkpoint)
    tokenizer = found.load_tokenizer()
    text_encoder.check_prompt(tokenizer, options.prompt)
    text_encoder.check_prompt(tokenizer, workload.negative_prompt, what="negative prompt")
    gemm.check(recipe.gemm, device.probe(), allow_reference=recipe.references == "allow")
    ranks = mesh.environment()[1] if mesh.under_torchrun() else mesh.ranks_to_start(recipe.mesh)
    pipeline.plan_shape(recipe, workload, found, world=ranks)
    if not mesh.under_torchrun() and ranks > 1:
        return cli.launch("wan_mlperf.generate", arguments, ranks)

    engine = pipeline.Pipeline.load(recipe, workload=workload)
    started = time.perf_counter()
    progress = cli.Progress("denoising", workload.steps)
    chunks = engine.stream_batch([options.prompt], on_step=lambda _step, _latents: progress.advance())
    if engine.mesh.is_replica_first:
        from wan_mlperf.video import write_mp4

        write_mp4(output, without_batch(chunks), workload.fps)
        progress.close()
        report(output, engine.spans.take(), time.perf_counter() - started)
    else:
        for _ in chunks:
            pass
    engine.mesh.close()
    return cli.DONE


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="python -m wan_mlperf.generate", description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("-o", "--output", default="video.mp4", metavar="FILE", help="the MP4 to write (default: video.mp4)")
    parser.add_argument("--force", action="store_true", help="replace the output file if it is there")
    parser.add_argument("--seed", type=int, help="seed of the initial noise (default: the workload's, 42)")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--size", metavar="HEIGHTxWIDTH", help="pixels, multiples of 16, such as 720x1280")
    parser.add_argument("--frames", type=int, help="video frames, 4 n + 1")
    parser.add_argument("--negative", metavar="PROMPT", help="negative prompt (default: the benchmark's)")
    cli.add_recipe_arguments(parser)
    return parser.parse_args(arguments)


def changes(options: argparse.Namespace) -> dict[str, Any]:
    """What the flags change of the workload. Raises BadInput."""
    changed: dict[str, Any] = {
        "seed": options.seed,
        "steps": options.steps,
        "frames": options.frames,
        "negative_prompt": options.negative,
    }
    if options.size is not None:
        height, _, width = options.size.lower().partition("x")
        if not (height.isascii() and height.isdigit() and width.isascii() and width.isdigit()):
            raise BadInput(f"--size: {options.size!r} is not allowed; allowed: HEIGHTxWIDTH, such as 720x1280")
        changed |= {"height": int(height), "width": int(width)}
    return {name: value for name, value in changed.items() if value is not None}


def check_output(path: Path, force: bool) -> Path:
    """Check that the file can be written and is not there yet. Raises BadInput."""
    from wan_mlperf.files import writable_folder

    if path.suffix.lower() != ".mp4":
        raise BadInput(f"--output: {str(path)!r} is not allowed; allowed: a name that ends in .mp4")
    writable_folder(path.parent, what="output folder")
    if path.is_dir() or (path.exists() and not force):
        raise BadInput(f"--output: {str(path)!r} exists; allowed: another name, or --force")
    return path


def without_batch(chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """[1, n, height, width, 3] -> [n, height, width, 3]."""
    return (chunk[0] for chunk in chunks)


def report(output: Path, spans: dict[str, float], seconds: float) -> None:
    """Say where the file is and how long each stage took."""
    stages = ", ".join(f"{stage.replace('_', ' ')} {value:.2f} s" for stage, value in spans.items())
    print(f"{output}: {seconds:.2f} s ({stages})", file=sys.stdout, flush=True)


if __name__ == "__main__":
    cli.entry(main)
