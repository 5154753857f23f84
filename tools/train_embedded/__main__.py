"""Train the embedded model from nothing and write its folder: `python -m tools.train_embedded --work DIR`."""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path

import torch

from . import experts, export, latents, score, text, vae


def main() -> None:
    """Run the stages in order; each goes on from its checkpoint in the work folder."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_embedded", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and log.jsonl; give it again to resume")
    parser.add_argument("--out", type=Path, help="the exported folder (default: <work>/embedded)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-scale", type=float, default=1.0, help="multiplies every stage's steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; the two experts share them")
    parser.add_argument("--score", type=int, default=126, help="held-out prompts to score, 0 for none")
    parser.add_argument("--only", choices=experts.RANGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not 0 < args.steps_scale <= 10:
        parser.error(f"--steps-scale {args.steps_scale} is not in 0..10")
    args.work.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    settings = (args.work, args.seed, args.steps_scale, device)

    if args.only:
        torch.set_num_threads(1)
    else:
        torch.set_num_threads(args.threads)
    tokenizer, encoder = text.train(*settings)
    autoencoder = vae.train(*settings)
    clips = latents.make(*settings, autoencoder)
    trainer = experts.Trainer(args.seed, device, clips, tokenizer, encoder)
    base = trainer.base(args.work, args.steps_scale)
    if args.only:
        trainer.expert(args.work, args.steps_scale, args.only, base)
        return
    if device.type == "cpu" and args.threads > 1:
        # two processes of one thread each waste less than one of two
        both = [subprocess.Popen([sys.executable, "-m", __package__, *sys.argv[1:], "--only", name]) for name in experts.RANGES]
        if any([process.wait() for process in both]):
            sys.exit("an expert's training failed; the same command resumes it")
    high, low = (trainer.expert(args.work, args.steps_scale, name, copy.deepcopy(base)) for name in experts.RANGES)
    autoencoder = vae.refine(*settings, autoencoder, clips.statistics()[1])
    out = args.out or args.work / "embedded"
    export.export(out, args.work / "tokenizer", encoder, autoencoder, clips.statistics(), high, low)
    if args.score:
        print(json.dumps(score.evaluate(out, args.score), indent=2))


if __name__ == "__main__":
    main()
