"""Compares ours with diffusers and plain xDiT: same weights, prompts and noise, alternating in one run; medians, spread, ratios.

Whole-video workloads (`tiny`, `mid`) run on any machine. Every contestant has its own processes, which idle while another runs.
The `*720p` workloads time one part at the benchmark's full size on one GPU (full_size.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from pydantic import TypeAdapter
from rich.table import Table

from wan_mlperf import checkpoint, cli, process
from wan_mlperf.bench import random_checkpoint
from wan_mlperf.bench.contestant import MARK
from wan_mlperf.bench.fidelity import PROMPTS, console
from wan_mlperf.errors import BadInput, Failed, choose
from wan_mlperf.files import atomic_write, scratch
from wan_mlperf.identity import commit, versions
from wan_mlperf.kernels.device import probe
from wan_mlperf.parallel import mesh as meshes
from wan_mlperf.recipe import Recipe, load_recipe

WHOLE = ("tiny", "mid")
PARTS = ("block720p", "expert720p", "vae720p")
# The architecture of the embedded model at 2,160 tokens: 9 latent frames of 24 x 40.
MID = ("workload.height=192", "workload.width=320", "workload.frames=33", "workload.steps=4")
STAGES = ("text_encode", "denoise_high", "denoise_low", "vae_decode", "to_host")
# Relative error of the latents against diffusers' up to which a ratio is printed: rounding in fp32, and the noise of bf16.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}


class Contestant:
    """A contestant's processes. `run` makes one video with them."""

    def __init__(self, name: str, kind: str, recipe: Recipe, ranks: int, folder: Path, work: Path) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.stages: list[dict[str, float]] = []
        self.latents = work / f"{name.replace(' ', '-')}.pt"
        job = work / f"{name.replace(' ', '-')}.json"
        values = TypeAdapter(Recipe).dump_python(recipe, mode="json")
        job.write_text(json.dumps({"kind": kind, "recipe": values, "folder": str(folder), "latents": str(self.latents)}))
        threads = len(os.sched_getaffinity(0))
        env = {**os.environ, "TMPDIR": str(work)}
        if kind != "ours":
            env["THP_MEM_ALLOC_ENABLE"] = "0"  # torch's default, not what importing wan_mlperf sets
        command = [sys.executable, "-m", "wan_mlperf.bench.contestant", str(job)]
        if kind != "diffusers":
            command[1:2] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
            threads = max(1, threads // ranks)
        self._log = (work / f"{name.replace(' ', '-')}.log").open("w+")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**env, "OMP_NUM_THREADS": str(threads)},
        )

    def load(self) -> None:
        """Wait until it has loaded."""
        self._read()

    def run(self, prompt: str) -> None:
        """Make one video and note its time."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: `_read` says why
            print(prompt, file=self._process.stdin, flush=True)
        answer = self._read()
        self.seconds.append(answer["seconds"])
        self.stages.append(answer["stages"])

    def stop(self) -> None:
        """Tell the processes to end without finishing their work."""
        self._process.terminate()

    def close(self) -> None:
        """End the processes, and wait for them."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        output: TextIO = self._process.stdout  # type: ignore[assignment]
        for line in output:
            if MARK in line:
                answer: dict[str, Any] = json.loads(line.split(MARK, 1)[1])
                return answer
        self._log.seek(0)
        said = self._log.read()
        own, _, launchers = said.rpartition("Traceback (most recent call last)")  # torchrun's comes last and says nothing
        cause = own if "ChildFailedError" in launchers else said
        raise Failed(f"bench: contestant {self.name!r} ended: {cause[-1500:]}")


def main(arguments: Sequence[str]) -> int:
    """`bench speed`: print a table with ratios, write JSON."""
    parser = cli.Parser(prog="python -m wan_mlperf.bench speed", description=__doc__)
    parser.add_argument("--workload", default="tiny", help=f"one of {', '.join(WHOLE + PARTS)} (default: tiny)")
    parser.add_argument("--ranks", type=int, help="ranks of xDiT and ours (default: all GPUs, or 2 without a GPU)")
    parser.add_argument(
        "--mesh", action="append", default=[], metavar="KEY=VALUE,...", help="a mesh of ours, such as cfg=1; may be repeated"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed videos per contestant")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one key of our recipe; then no tolerance is checked",
    )
    options = parser.parse_args(arguments)
    choose("--workload", options.workload, WHOLE + PARTS)
    if options.rounds < 1:
        raise BadInput(f"--rounds: {options.rounds} is not allowed; allowed: from 1")
    if options.workload in PARTS:
        from wan_mlperf.bench import full_size

        return full_size.main(options.workload, options.rounds, options.json)
    ranks = options.ranks or meshes.ranks_to_start(load_recipe("tiny").mesh)
    meshes.refuse_shared_gpus(ranks)
    with scratch("bench") as folder:
        report = compare(options, ranks, folder)
    show(report)
    if options.json:
        atomic_write(Path(options.json), json.dumps(report, indent=1))
    return process.DONE


def compare(options: argparse.Namespace, ranks: int, work: Path) -> dict[str, Any]:
    """Run all contestants in turn and return the figures."""
    theirs, ours, model = the_recipes(options, work)
    wanted: list[tuple[str, str, Recipe, int]] = [("diffusers", "diffusers", theirs, 1), ("xDiT", "xdit", theirs, ranks)]
    wanted += [(f"ours {mesh}", "ours", recipe, ranks) for mesh, recipe in ours.items()]
    contestants: list[Contestant] = []
    try:
        for name, kind, recipe, count in wanted:
            contestants.append(Contestant(name, kind, recipe, count, model, work))
            contestants[-1].load()
        for number in range(options.rounds):
            for one in contestants:
                one.run(PROMPTS[number % len(PROMPTS)])
    except BaseException:
        for one in contestants:
            one.stop()
        raise
    finally:
        for one in contestants:
            one.close()
    reference = torch.load(contestants[0].latents, weights_only=True)
    errors = {one.name: _error(torch.load(one.latents, weights_only=True), reference) for one in contestants[1:]}
    tolerance = None if options.set else TOLERANCE[theirs.model.dtype]
    for name, error in errors.items():
        if tolerance is not None and error > tolerance:
            raise Failed(f"bench: latents of {name!r} differ from diffusers' by {error:.2e}; tolerance {tolerance:g}: no ratio")
    figures = {one.name: figures_of(one) for one in contestants}
    best = min((one for one in contestants if one.name.startswith("ours")), key=lambda one: figures[one.name]["median_s"])
    return {
        "workload": options.workload,
        "ranks": ranks,
        "rounds": options.rounds,
        "recipe": ours[best.name.removeprefix("ours ")].name,
        "changed": options.set,
        "dtype": theirs.model.dtype,
        "device": probe().name,
        "threads": len(os.sched_getaffinity(0)),
        "contestants": figures,
        "latents_error": errors,
        "tolerance": tolerance,
        "best": best.name,
        "ratios": {name.lower(): figures[best.name]["median_s"] / figures[name]["median_s"] for name in ("diffusers", "xDiT")},
        "versions": versions(),
        "commit": commit(),
    }


def the_recipes(options: argparse.Namespace, work: Path) -> tuple[Recipe, dict[str, Recipe], Path]:
    """Return the recipe for diffusers and xDiT, ours by mesh, and the folder that all load: `tiny` in fp32, `mid` in bf16."""
    plain = ["attention.early=sdpa", "attention.late=sdpa", "gemm.high_noise=bf16", "gemm.low_noise=bf16"]
    if options.workload == "mid":
        folder = random_checkpoint.write(work / "mid", dtype=torch.bfloat16)
        plain += [*MID, "model.dtype=bfloat16"]
    else:
        folder = checkpoint.find("embedded").folder
        plain += ["model.dtype=float32"]
    plain += [f"model.checkpoint={folder}"]
    ours = {}
    for mesh in options.mesh or ["cfg=auto"]:
        keys = [f"mesh.{key}" for key in mesh.split(",")]
        ours[mesh] = load_recipe("tiny", overrides=[*plain, *options.set, *keys])
    return load_recipe("tiny", overrides=plain), ours, folder


def figures_of(one: Contestant) -> dict[str, Any]:
    """Return median and spread of a contestant's seconds, and the median of each stage."""
    stages = {stage: statistics.median(run.get(stage, 0.0) for run in one.stages) for stage in STAGES}
    return {"median_s": statistics.median(one.seconds), "min_s": min(one.seconds), "max_s": max(one.seconds), "stages_s": stages}


def show(report: dict[str, Any]) -> None:
    """Print the figures as a table."""
    conditions = f"{report['ranks']} ranks, {report['threads']} threads in all, {report['dtype']}, {report['device']}"
    table = Table(title=f"{report['workload']}: {conditions}; medians of {report['rounds']}, in seconds")
    for heading in ("", "median", "min", "max", *STAGES, "ours / theirs", "latents' error"):
        table.add_column(heading.replace("_", " "), justify="right")
    for name, figures in report["contestants"].items():
        ratio = report["ratios"].get(name.lower())
        error = report["latents_error"].get(name)
        table.add_row(
            name,
            *(f"{figures[key]:.3f}" for key in ("median_s", "min_s", "max_s")),
            *(f"{figures['stages_s'][stage]:.3f}" for stage in STAGES),
            "" if ratio is None else f"{ratio:.3f}",
            "" if error is None else f"{error:.1e}",
        )
    console().print(table)


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())
