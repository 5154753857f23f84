"""Train the embedded model from nothing and write its folder: `python -m tools.train_embedded --work DIR`."""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from wan_mlperf.kernels.device import gpu_count

from . import experts, export, latents, score, text, vae


def main() -> None:
    """Run the stages in order. Each continues from its checkpoint in the work folder."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_embedded", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and log.jsonl; name it again to resume")
    parser.add_argument("--out", type=Path, help="the exported folder (default: <work>/embedded)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-scale", type=float, default=1.0, help="multiplies every stage's steps")
    parser.add_argument("--device", default="cuda" if gpu_count() else "cpu")
    parser.add_argument(
        "--processes", type=int, default=2, help="on a CPU, 2 or more: run the last stages in separate processes, one thread each"
    )
    parser.add_argument("--score", type=int, default=126, help="held-out prompts to score, 0 for none")
    parser.add_argument("--only", choices=("refine", *experts.RANGES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not 0 < args.steps_scale <= 10:
        parser.error(f"--steps-scale {args.steps_scale} is not in 0..10")
    args.work.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    settings = (args.work, args.seed, args.steps_scale, device)
    torch.set_num_threads(1)  # a second thread gains little for tensors this small, and costs tenfold if its core is busy

    def in_background(name: str) -> list[subprocess.Popen[bytes]]:
        """On a CPU, run one stage in a separate process."""
        if device.type != "cpu" or args.processes < 2:
            return []
        return [subprocess.Popen([sys.executable, "-m", "tools.train_embedded", *sys.argv[1:], "--only", name])]

    tokenizer, encoder = text.train(*settings)
    autoencoder = vae.train(*settings)
    clips = latents.make(*settings, autoencoder)
    trainer = experts.Trainer(args.seed, device, clips, tokenizer, encoder)
    base = trainer.base(args.work, args.steps_scale)
    guess = partial(trainer.guess, copy.deepcopy(base))
    if args.only == "refine":
        vae.refine(*settings, autoencoder, guess)
        return
    if args.only:
        trainer.expert(args.work, args.steps_scale, args.only, base)
        return
    processes = in_background("low") + in_background("high") + in_background("refine")
    if any([process.wait() for process in processes]):
        sys.exit("a stage failed; the same command resumes it")
    # from here on every stage has its checkpoint, or runs now if there were no other processes
    high, low = (trainer.expert(args.work, args.steps_scale, name, copy.deepcopy(base)) for name in experts.RANGES)
    autoencoder = vae.refine(*settings, autoencoder, guess)
    out = args.out or args.work / "embedded"
    export.export(out, args.work / "tokenizer", encoder, autoencoder, clips.statistics(), high, low)
    if args.score:
        print(json.dumps(score.evaluate(out, args.score), indent=2))


if __name__ == "__main__":
    main()
