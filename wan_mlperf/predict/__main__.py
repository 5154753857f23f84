"""Seconds, memory and messages of a recipe on hardware that is not here: rehearsed at full size, then priced.

`python -m wan_mlperf.predict --recipe mi355x-singlestream --hardware mi355x --gpus 8`; several recipes or kinds of hardware side
by side with --html. `predict fit` refits the model's constants to measured runs and says how well the model holds.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wan_mlperf import cli, process
from wan_mlperf.errors import BadInput, choose

if TYPE_CHECKING:  # imported when they are needed: --help and a misspelt flag must not wait for torch
    from wan_mlperf.predict.forecast import Forecast
    from wan_mlperf.predict.memory import Fit
    from wan_mlperf.recipe import Recipe

RECIPE, GPUS = "mi355x-singlestream", 8
NOT_WITH_FLOOR = ("quick", "fits", "details", "constants", "json", "html")


def main(arguments: Sequence[str]) -> int:
    """Predict, or fit; return the exit code."""
    if arguments and arguments[0] == "fit":
        from wan_mlperf.predict import fit_command

        return fit_command.main(arguments[1:])
    options = parse(arguments)
    from wan_mlperf.predict import tables

    if options.floor:
        show_floors(options)
        return process.DONE
    forecasts = make_forecasts(options)
    for one in forecasts:
        tables.show(one, details=options.details)
        if options.details and not options.quick:
            from wan_mlperf.predict import rehearsal

            tables.show_blocks(rehearsal.one_block(one.subject))
    if options.fits:
        for one in forecasts:
            tables.show_fits(one, other_fits(one))
    if len(forecasts) > 1:
        tables.show_side_by_side(forecasts)
    write_outputs(forecasts, options)
    for one in forecasts:
        check_memory(one)
    return process.DONE


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="python -m wan_mlperf.predict", description=__doc__, epilog="See also: predict fit --help")
    parser.add_argument(
        "--recipe", action="append", type=cli.path, help=f"a YAML file or name from configs/ (default: {RECIPE}); may be repeated"
    )
    parser.add_argument("--hardware", action="append", help="a GPU's name, such as mi355x, h100, rtx-5090; may be repeated")
    parser.add_argument("--gpus", type=int, default=GPUS, help=f"how many of them (default: {GPUS})")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key of the recipe")
    parser.add_argument(
        "--model", type=cli.path, help="embedded, the hub name, or a Diffusers folder; only configurations are read"
    )
    parser.add_argument("--exact", action="store_true", help="turn every approximation off")
    parser.add_argument("--size", metavar="HEIGHTxWIDTH", help="pixels, multiples of 16, such as 720x1280")
    parser.add_argument("--frames", type=int, help="video frames, 4 n + 1")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument(
        "--kernel",
        action="append",
        default=[],
        metavar="NAME=KERNEL",
        help="price an attention of the recipe as another kernel, such as sage_fp4=AITER_ASM_MXFP4",
    )
    parser.add_argument("--constants", type=cli.path, metavar="FILE", help="constants that `predict fit --write` wrote")
    parser.add_argument("--quick", action="store_true", help="from first principles: no rehearsal, so memory is not known")
    parser.add_argument("--fits", action="store_true", help="also what another dtype, chunk or format would need in memory")
    parser.add_argument(
        "--details", action="store_true", help="also calls, FLOPs, bytes and messages of every rehearsed rank and one block"
    )
    parser.add_argument("--floor", action="store_true", help="only what FLOPs and bytes take at the hardware's peaks")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="write the figures there")
    parser.add_argument("--html", type=cli.output_file, metavar="FILE", help="write a page with stacked bars there")
    options = parser.parse_args(arguments)
    if not options.hardware:
        raise BadInput("--hardware: is missing; give a GPU's name, such as mi355x")
    check_flags(options)
    return options


def check_flags(options: argparse.Namespace) -> None:
    """Raise BadInput for flags that do not go together: one of them would do nothing, or undo the other."""
    if options.fits and options.quick:
        raise BadInput("--fits with --quick: memory is known from a rehearsal; allowed: one of them")
    if options.floor and (others := [name for name in NOT_WITH_FLOOR if getattr(options, name)]):
        raise BadInput(
            f"--floor with --{others[0]}: it is one table, not rehearsed, with the shipped constants; allowed: one of them"
        )
    cli.check_outputs({"--json": options.json, "--html": options.html})
    names = [_pair(text)[0] for text in options.kernel]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BadInput(f"--kernel: {twice!r} is given twice; allowed: one kernel for each attention of the recipe")


def make_forecasts(options: argparse.Namespace) -> list[Forecast]:
    """Make one forecast for each recipe on each kind of hardware. Raises BadInput."""
    from wan_mlperf.predict import rates, rehearsal
    from wan_mlperf.predict.forecast import forecast
    from wan_mlperf.recipe import replace_workload

    constants = None if options.constants is None else rates.read_constants(Path(options.constants))
    recipes = load_recipes(options)
    kernels = kernels_by_recipe(options, recipes)
    jobs = [(recipe, named, gpu) for recipe, named in zip(recipes, kernels, strict=True) for gpu in options.hardware]
    progress = cli.Progress("predicting", len(jobs))
    forecasts = []
    for recipe, named, gpu in jobs:
        with named_error(recipe.name, gpu, several=len(jobs) > 1):
            forecasts.append(
                forecast(
                    recipe,
                    gpu,
                    gpus=options.gpus,
                    workload=replace_workload(recipe.effective_workload, **changes(options)),
                    kernels=named,
                    constants=constants,
                    rehearsed=not options.quick,
                    workers=rehearsal.cores(),
                )
            )
        progress.advance()
    progress.close()
    return forecasts


def show_floors(options: argparse.Namespace) -> None:
    """Print the lower bound of each recipe on each kind of hardware. Raises BadInput."""
    from wan_mlperf.predict import tables
    from wan_mlperf.predict.from_recipe import prices_of
    from wan_mlperf.recipe import replace_workload
    from wan_mlperf.step_plan import make_plan

    recipes = load_recipes(options)
    for recipe, kernels in zip(recipes, kernels_by_recipe(options, recipes), strict=True):
        for gpu in options.hardware:
            with named_error(recipe.name, gpu, several=len(recipes) * len(options.hardware) > 1):
                workload = replace_workload(recipe.effective_workload, **changes(options))
                prices = prices_of(recipe, gpu, gpus=options.gpus, workload=workload, kernels=kernels)
                tables.show_floor(prices, make_plan(recipe, workload), recipe.name)


@contextlib.contextmanager
def named_error(recipe: str, gpu: str, *, several: bool) -> Iterator[None]:
    """Say in a BadInput which of `several` predictions it is about."""
    try:
        yield
    except BadInput as error:
        raise (BadInput(f"{recipe} on {gpu}: {error}") if several else error) from None


def kernels_by_recipe(options: argparse.Namespace, recipes: Sequence[Recipe]) -> list[dict[str, str]]:
    """Of --kernel, what each recipe uses. Raises BadInput for a name that none of them uses."""
    from wan_mlperf.recipe import replace_workload
    from wan_mlperf.step_plan import make_plan

    wanted = dict(_pair(text) for text in options.kernel)
    plans = [make_plan(one, replace_workload(one.effective_workload, **changes(options))) for one in recipes]
    used = [{step.attention for step in plan} for plan in plans]
    for name in wanted:
        choose("--kernel", name, sorted(set().union(*used)))
    return [{name: kernel for name, kernel in wanted.items() if name in names} for names in used]


def load_recipes(options: argparse.Namespace) -> list[Recipe]:
    """The recipes that are named, changed as the flags say. Raises BadInput."""
    from wan_mlperf.recipe import load_recipe

    names = options.recipe or [RECIPE]
    return [load_recipe(name, overrides=options.set, model=options.model, exact=options.exact) for name in names]


def changes(options: argparse.Namespace) -> dict[str, object]:
    """Return what the flags change in the workload. Raises BadInput."""
    return cli.workload_changes(options.size, steps=options.steps, frames=options.frames)


def check_memory(one: Forecast) -> None:
    """Raise BadInput if a rank does not fit, with the GB that it lacks."""
    need = one.need
    if need is None or not (lacks := need.lacks(one.gpu)):
        return
    parts = ", ".join(f"{name.replace('_', ' ')} {size:.1f}" for name, size in need.weights.items())
    raise BadInput(
        f"{one.recipe} on {one.gpus} x {one.gpu.name}: rank {need.rank} needs {need.total:.1f} GB ({parts}, activations "
        f"{need.activations:.1f} in {need.stage}) and lacks {lacks:.1f}; allowed: {one.gpu.memory / 1e9:.1f} GB. --fits shows "
        "what other formats and chunks would need"
    )


def other_fits(one: Forecast) -> list[Fit]:
    """The memory that a rank needs with each dtype and chunk of the decode and each format of the experts."""
    from wan_mlperf.predict import memory, rehearsal

    return memory.other_ways(one.subject, one.ranks, workers=rehearsal.cores())


def write_outputs(forecasts: Sequence[Forecast], options: argparse.Namespace) -> None:
    """Write --json and --html."""
    import json

    from wan_mlperf.files import atomic_write
    from wan_mlperf.predict import page

    if options.json:
        found = [one.as_json() for one in forecasts]
        content = found[0] if len(found) == 1 else {"predictions": found}
        _write(Path(options.json), json.dumps(content, indent=1), atomic_write)
    if options.html:
        _write(Path(options.html), page.render(forecasts), atomic_write)


def _write(path: Path, content: str, write: Callable[[Path, str], object]) -> None:
    try:
        write(path, content)
    except OSError as error:
        raise BadInput(
            f"{str(path)!r}: cannot be written ({error.strerror}); allowed: a file in a folder you can write to"
        ) from None


def _pair(text: str) -> tuple[str, str]:
    name, equals, kernel = text.partition("=")
    if not equals or not name or not kernel:
        raise BadInput(f"--kernel {text!r}: allowed: NAME=KERNEL, such as sage_fp4=AITER_ASM_MXFP4")
    return name, kernel


if __name__ == "__main__":
    process.entry(main)
