"""What a recipe costs: the same prompts and seeds with `exact` and with the recipe, compared in latents, in pixels and, for the
embedded model, in whether the videos show what their prompts say.

`fidelity` measures this for a schedule without an expensive VBench run; `embedded` scores the embedded model.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import imageio.v3
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from wan_mlperf import cli, preflight, process, ranks
from wan_mlperf.bench import approximations
from wan_mlperf.checkpoint import Checkpoint
from wan_mlperf.errors import BadInput, choose
from wan_mlperf.files import atomic_write, writable_folder
from wan_mlperf.kernels.backends import ARCHS
from wan_mlperf.parallel import survey
from wan_mlperf.parallel.launch import launch
from wan_mlperf.pipeline import Pipeline
from wan_mlperf.preflight import Setup
from wan_mlperf.recipe import Recipe, load_recipe, make_exact
from wan_mlperf.shapes.clips import Scene, held_out_prompts
from wan_mlperf.shapes.detect import score, steadiness
from wan_mlperf.step_plan import Step
from wan_mlperf.video import contact_sheet, write_mp4

# For models other than the embedded one: subjects, scenes and styles as in VBench's prompts.
PROMPTS = (
    "a person swimming in ocean",
    "a cat walking on a wooden fence",
    "a steam train moving on a mountainside",
    "a crowded market street at night, in the style of an oil painting",
    "a boat sailing slowly past a lighthouse",
    "an astronaut riding a horse across a desert",
    "a glass of water on a kitchen table, morning light",
    "fireworks over a harbour",
)
SHEET = 8  # videos in a contact sheet
PICTURES = (".png", ".jpg")
ATTRIBUTES = ("foreground", "background", "direction", "shape")


@dataclasses.dataclass
class Generated:
    """The result of one prompt: latents after the last high-noise step and at the end, [channels, F, h, w], and uint8 frames."""

    high: torch.Tensor
    end: torch.Tensor
    frames: np.ndarray


def main(arguments: Sequence[str]) -> int:
    """`bench fidelity`: compare each case with exact. Writes a table, JSON, and a side-by-side MP4 of the worst prompt."""
    options = parse(arguments, "fidelity")
    base = base_of(options)
    # A case is the recipe with some keys changed. Without --case or --parts there is one: the recipe itself.
    cases = approximations.parts_of(base) if options.parts else {}
    cases |= {name: base_of(options, *name.split(",")) for name in options.case}
    cases = cases or {base.name: base}
    prompts, scenes = prompts_of(base, options.prompts)
    folder = writable_folder(Path(options.outputs), what="output folder")
    exact = prepare(make_exact(base), prompts)
    setups = {name: prepare(recipe, prompts, verified=exact.checkpoint) for name, recipe in cases.items()}
    setups = {name: dataclasses.replace(setup, rehearsed_ranks=options.exchange_ranks) for name, setup in setups.items()}
    if (code := start_ranks(base, "fidelity", arguments)) is not None:
        return code

    batch = options.batch or (8 if scenes else 1)
    reference = make(exact, prompts, batch=batch)
    report: dict[str, Any] = {"recipe": base.name, "prompts": len(prompts), "ranks": preflight.ranks_for(base), "cases": []}
    if scenes and reference:
        report["exact_score"] = score([one.frames for one in reference], scenes)
    worst: tuple[float, np.ndarray] | None = None
    for name, setup in setups.items():
        made = make(setup, prompts, batch=batch)
        if not made:
            continue  # not the replica's first rank
        rows = [compare(ours, theirs) for ours, theirs in zip(made, reference, strict=True)]
        case: dict[str, Any] = {"case": name, "mean": {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}}
        case["kernels"] = {
            one.name: {"runs": one.runs, "numerics": one.numerics} for one in survey.of(setup.recipe, setup.plan)[0]
        }
        case["per_prompt"] = [{"prompt": prompt, **row} for prompt, row in zip(prompts, rows, strict=True)]
        if scenes:
            case["score"] = score([one.frames for one in made], scenes)
        report["cases"].append(case)
        lowest = int(np.argmin([row["psnr"] for row in rows]))
        if worst is None or rows[lowest]["psnr"] < worst[0]:
            worst = rows[lowest]["psnr"], np.concatenate([reference[lowest].frames, made[lowest].frames], axis=2)
    if options.parts and report["cases"]:
        errors = {case["case"]: case["mean"]["latents_end"] for case in report["cases"]}
        report["expected"] = approximations.expected({name: errors[name] for name in approximations.parts_of(base)})
    if worst is not None:
        finish(report, worst[1], base.effective_workload.fps, folder, options.json)
    return process.DONE


def main_embedded(arguments: Sequence[str]) -> int:
    """`bench embedded`: do videos show what held-out prompts say, with steady outlines, for exact and for the recipe?"""
    options = parse(arguments, "embedded")
    recipe = preflight.recipe_from(options)
    if recipe.model.checkpoint != "embedded":
        raise BadInput(f"model {recipe.model.checkpoint!r}: is not allowed; allowed: embedded, which this score is made for")
    prompts, scenes = prompts_of(recipe, options.prompts)
    exact = prepare(make_exact(recipe), prompts)
    setup = prepare(recipe, prompts, verified=exact.checkpoint)
    if (code := start_ranks(recipe, "embedded", arguments)) is not None:
        return code
    report: dict[str, Any] = {"prompts": len(prompts), "recipe_name": recipe.name}
    table = Table(title=f"{len(prompts)} held-out prompts")
    for heading in ("", *ATTRIBUTES, "steadiness"):
        table.add_column(heading, justify="right")
    for name, one in (("exact", exact), ("recipe", setup)):
        made = make(one, prompts, batch=options.batch or 8)
        if not made:
            continue
        videos = [one.frames for one in made]
        report[name] = score(videos, scenes) | {"steadiness": float(np.mean([steadiness(video) for video in videos]))}
        # Control: scored against another prompt's scene, a score must fall to chance.
        report[f"{name}_shuffled"] = score(videos, [*scenes[len(scenes) // 2 :], *scenes[: len(scenes) // 2]])
        if name == "recipe" and options.sheet:
            suffix = Path(options.sheet).suffix.lower()
            atomic_write(Path(options.sheet), imageio.v3.imwrite("<bytes>", contact_sheet(videos[:SHEET]), extension=suffix))
        for row in (name, f"{name}_shuffled"):
            figures = [f"{report[row][key]:.3f}" for key in (*ATTRIBUTES, "steadiness") if key in report[row]]
            table.add_row(row.replace("_", ", "), *figures)
    if "exact" in report:
        console().print(table)
        if options.json:
            atomic_write(Path(options.json), json.dumps(report, indent=1))
    return process.DONE


def parse(arguments: Sequence[str], command: str) -> argparse.Namespace:
    """Read the command line of `fidelity` or `embedded`."""
    parser = cli.Parser(prog=f"python -m wan_mlperf.bench {command}")
    cli.add_recipe_arguments(parser)
    cli.add_arch_argument(parser, "whose kernels' numerics the references have")
    parser.add_argument("--prompts", type=int, default=16 if command == "fidelity" else 126, metavar="N", help="how many prompts")
    parser.add_argument("--batch", type=int, metavar="N", help="prompts made at once (default: 8, with a large model 1)")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="write the figures there")
    if command == "embedded":
        parser.add_argument(
            "--sheet", type=cli.output_file, metavar="FILE", help=f"a picture of the recipe's first {SHEET} videos, a row each"
        )
    if command == "fidelity":
        parser.add_argument(
            "--case", action="append", default=[], metavar="KEY=VALUE,...", help="a variant of the recipe; may be repeated"
        )
        parser.add_argument("--parts", action="store_true", help="also each approximation of the recipe alone, and their sum")
        parser.add_argument(
            "--on", type=cli.path, metavar="RECIPE", help="run on this recipe's model, size and mesh, where its own cannot run"
        )
        parser.add_argument(
            "--exchange-ranks",
            type=int,
            default=8,
            metavar="N",
            help="with exchange fp8: where one rank has all tokens here, round as if N ranks exchanged them (default: 8)",
        )
        parser.add_argument(
            "--outputs", type=cli.path, default="outputs/fidelity", metavar="FOLDER", help="where the side-by-side MP4 goes"
        )
    options = parser.parse_args(arguments)
    for name in ("prompts", "batch", "exchange_ranks"):
        if (number := getattr(options, name, None)) is not None and number < 1:
            raise BadInput(f"--{name.replace('_', '-')}: {number} is not allowed; allowed: from 1")
    if command == "embedded" and options.sheet and Path(options.sheet).suffix.lower() not in PICTURES:
        raise BadInput(f"--sheet: {options.sheet!r} is not allowed; allowed: a name that ends in {' or '.join(PICTURES)}")
    if options.arch is not None:
        options.set.append(f"references={choose('--as', options.arch, ARCHS)}")
    return options


def base_of(options: argparse.Namespace, *changes: str) -> Recipe:
    """Return the recipe that the flags of `fidelity` name, with some more changes. Raises BadInput."""
    recipe = preflight.recipe_from(argparse.Namespace(**{**vars(options), "set": [*options.set, *changes]}))
    return recipe if options.on is None else approximations.on(recipe, load_recipe(options.on))


def prompts_of(recipe: Recipe, count: int) -> tuple[list[str], list[Scene]]:
    """Return `count` prompts. The embedded model gets ones that training has not seen, with the scenes they describe."""
    if recipe.model.checkpoint != "embedded":
        return list(PROMPTS[:count]), []
    pairs = held_out_prompts()
    return [prompt for prompt, _ in pairs[:count]], [scene for _, scene in pairs[:count]]


def prepare(recipe: Recipe, prompts: Sequence[str], *, verified: Checkpoint | None = None) -> Setup:
    """Check a recipe and its prompts for the current ranks, or for those that will be started. Raises BadInput."""
    return preflight.prepare(recipe, prompts=prompts, world=preflight.ranks_for(recipe), verified=verified)


def start_ranks(recipe: Recipe, command: str, arguments: Sequence[str]) -> int | None:
    """Outside torchrun, start the recipe's ranks and return their exit code. On a rank that has to work, return None."""
    world = preflight.ranks_for(recipe)
    if ranks.under_torchrun() or world == 1:
        return None
    return launch("wan_mlperf.bench", [command, *arguments], world)


def make(setup: Setup, prompts: Sequence[str], *, batch: int) -> list[Generated]:
    """Make the videos of `prompts`, each from the workload's seed. The list is empty except on the replica's first rank."""
    pipeline = Pipeline.load(setup)
    last = len(pipeline.plan) - 1
    last_high = max((step.index for step in pipeline.plan if step.expert == "high_noise"), default=last)
    progress = cli.Progress(setup.recipe.name, len(prompts))
    made: list[Generated] = []
    for start in range(0, len(prompts), batch):
        group = prompts[start : start + batch]
        after: dict[int, torch.Tensor] = {}

        def keep(step: Step, latents: torch.Tensor, after: dict[int, torch.Tensor] = after) -> None:
            if step.index in (last_high, last):
                after[step.index] = latents.float().cpu()

        chunks = list(pipeline.stream_batch(group, on_step=keep))
        if chunks:
            frames = np.concatenate(chunks, axis=1)
            made += [Generated(after[last_high][index], after[last][index], frames[index]) for index in range(len(group))]
        for _ in group:
            progress.advance()
    progress.close()
    del pipeline
    gc.collect()  # two models of this size do not fit on a GPU
    return made


def compare(ours: Generated, theirs: Generated) -> dict[str, float]:
    """Return the latents' relative errors, and the frames' PSNR in dB and SSIM (equal frames count as 99 dB)."""
    pairs = list(zip(ours.frames, theirs.frames, strict=True))
    equal = np.array_equal(ours.frames, theirs.frames)
    return {
        "latents_high": float((ours.high - theirs.high).norm() / theirs.high.norm()),
        "latents_end": float((ours.end - theirs.end).norm() / theirs.end.norm()),
        "psnr": 99.0 if equal else float(peak_signal_noise_ratio(theirs.frames, ours.frames, data_range=255)),
        "ssim": float(np.mean([structural_similarity(b, a, channel_axis=-1, data_range=255) for a, b in pairs])),
    }


def finish(report: dict[str, Any], worst: np.ndarray, fps: int, folder: Path, file: str | None) -> None:
    """Print the table, and write JSON and the side-by-side MP4 (exact on the left, the recipe on the right)."""
    scored = "exact_score" in report
    table = Table(title=f"{report['recipe']} against exact, {report['prompts']} prompts")
    headings = ["case", "latents, last high-noise step", "latents, end", "PSNR dB", "SSIM", *(ATTRIBUTES if scored else ())]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "case" else "right", overflow="fold")
    if scored:
        table.add_row("exact", "0", "0", "-", "1", *(f"{report['exact_score'][key]:.3f}" for key in ATTRIBUTES))
    for case in report["cases"]:
        mean, extra = case["mean"], [f"{case['score'][key]:.3f}" for key in ATTRIBUTES] if scored else []
        figures = (f"{mean['latents_high']:.4f}", f"{mean['latents_end']:.4f}", f"{mean['psnr']:.2f}", f"{mean['ssim']:.4f}")
        table.add_row(case["case"], *figures, *extra)
    if "expected" in report:
        table.add_row("all, if errors add by their squares", "", f"{report['expected']:.4f}")
    console().print(table)
    for name, line in {name: line for case in report["cases"] for name, line in case["kernels"].items()}.items():
        print(f"{name}: {line['runs']}: {line['numerics']}")
    video = folder / f"worst-{datetime.now():%Y%m%d-%H%M%S}.mp4"
    write_mp4(video, [worst], fps)
    process.tell(f"worst prompt, exact left and recipe right: {video}")
    if file:
        atomic_write(Path(file), json.dumps(report, indent=1))


def console() -> Console:
    """Return a console that does not fold tables where there is no terminal."""
    return cli.console(width=150)
