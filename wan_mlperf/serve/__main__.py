"""A server that keeps the model loaded: `python -m wan_mlperf.serve --recipe R`.

MLCommons' endpoints client, OpenAI's client and a browser (the page at /) are served by the same replicas.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from wan_mlperf import cli, process, ranks

STOP_S = 5  # for the last answers, once the running jobs are done


def main(arguments: Sequence[str]) -> int:
    """Serve until a signal, and return the exit code."""
    options = parse(arguments)
    cli.check_recipe(options)
    from wan_mlperf import preflight, video
    from wan_mlperf.parallel.launch import launch
    from wan_mlperf.replicas import together
    from wan_mlperf.serve.options import check, take_port

    together.streams([options.recipe])
    with together.checks():
        recipe = preflight.recipe_from(options)
        checked = check(options)
        taken = take_port(options) if ranks.is_first() else None
        video.check_encoder()
        setup = preflight.prepare(recipe, world=preflight.ranks_for(recipe))
    if not ranks.under_torchrun():
        if taken is not None:
            taken.close()  # it is free; rank 0 will take it again
        return launch("wan_mlperf.serve", arguments, setup.shape.world, stop_s=checked.drain_s + STOP_S)
    from wan_mlperf.serve import session

    return session.run(checked, setup, taken)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="python -m wan_mlperf.serve", description=__doc__)
    cli.add_recipe_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this host only)")
    parser.add_argument("--port", type=int, default=8000, help="port (default: 8000; 0: any free one)")
    parser.add_argument("--folder", type=cli.path, default="served", help="where videos and manifest.json are kept (served)")
    parser.add_argument("--token-file", type=cli.path, metavar="FILE", help="require the token in this file from every client")
    parser.add_argument(
        "--latents", type=cli.path, metavar="FOLDER", help="folder of initial noise files that requests may name (latent_path)"
    )
    parser.add_argument("--most-waiting", type=int, default=64, metavar="N", help="most jobs of /v1/videos in the queue (64)")
    parser.add_argument("--drain", type=float, default=25.0, metavar="SECONDS", help="time for running jobs after SIGTERM (25)")
    parser.add_argument("--any-workload", action="store_true", help="requests may choose size, length, steps and guidance")
    parser.add_argument("--recipe-workload", action="store_true", help="ignore what requests say of these: use the recipe's")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    process.entry(main)
