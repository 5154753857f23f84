"""`predict fit`: fits the constants to measured runs, and prints measured seconds, predicted seconds and errors."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from sut import result as results
from wan_mlperf import cli, process
from wan_mlperf.errors import BadInput
from wan_mlperf.files import atomic_write
from wan_mlperf.pages.charts import NONE
from wan_mlperf.predict import fit, hardware, own_run, rates, rows, work
from wan_mlperf.predict.fit import Checked
from wan_mlperf.predict.forecast import configs_of
from wan_mlperf.predict.from_recipe import device_of, shape_of
from wan_mlperf.predict.rows import Row, Skipped
from wan_mlperf.predict.tables import console, table
from wan_mlperf.recipe import load_recipe, replace_workload

ERRORS = {
    "mean_not_fitted": "rows not fitted",
    "mean_mlperf_not_fitted": "MLPerf's of them",
    "mean_unseen_submitter": "all, with their submitter unseen",
}
COUNTS = {"rows": "rows", "fitted": "fitted", "exceptions": "named exceptions"}


def main(arguments: Sequence[str]) -> int:
    """Fit, check, print; return the exit code."""
    options = parse(arguments)
    measured, skipped = rows.read()
    for name in options.measurements:
        more, left_out = rows.read(Path(name))
        measured += more
        skipped += left_out
    for name in options.run:
        measured.append(_own_run(Path(name)))
    constants = fit.fit(measured)
    checked = fit.check(measured, constants)
    show(checked, skipped)
    if options.json:
        _write(options.json, _as_json(checked, skipped, constants))
    if options.write:
        whole, kernel = fit.residuals(checked, constants)
        about = json.loads(rates.CONSTANTS.read_text(encoding="utf-8"))["about"]
        _write(options.write, {"about": about, "values": constants, "residual": whole, "kernel_residual": kernel})
    return process.DONE


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(prog="python -m wan_mlperf.predict fit", description=__doc__)
    parser.add_argument(
        "--measurements",
        action="append",
        default=[],
        type=cli.path,
        metavar="FILE",
        help='more rows, as in wan_mlperf/predict/measurements.json; those with "fit": true are fitted, too',
    )
    parser.add_argument(
        "--run", action="append", default=[], type=cli.path, metavar="FOLDER", help="a finished run of ours, as a row to fit"
    )
    parser.add_argument(
        "--write", type=cli.output_file, metavar="FILE", help="write the constants there, for predict --constants"
    )
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="write the table there")
    options = parser.parse_args(arguments)
    cli.check_outputs({"--write": options.write, "--json": options.json})
    return options


def show(checked: Sequence[Checked], skipped: Sequence[Skipped]) -> None:
    """Print every row, the exceptions with their reasons, and how well the model holds."""
    made = table("Published or measured runs; * fitted", "run", "measured, s", "predicted, s", "error", "error, submitter unseen")
    for one in checked:
        unseen = NONE if one.unseen_error is None else f"{one.unseen_error:+.1%}"
        name = f"{one.row.id}{' *' if one.row.fitted else ''}{' (exception)' if one.row.exception else ''}"
        made.add_row(name, f"{one.row.seconds:.2f}", f"{one.predicted:.2f}", f"{one.error:+.1%}", unseen)
    console().print(made)
    for one in checked:
        if one.row.exception:
            print(f"exception {one.row.id}, {one.error:+.0%}: {one.row.exception}")
    for left_out in skipped:
        print(f"not predicted {left_out.id}: {left_out.reason}")
    figures = fit.summary(checked)
    counts = ", ".join(f"{figures[name]:.0f} {words}" for name, words in COUNTS.items())
    errors = ", ".join(f"{words} {figures[name]:.1%}" for name, words in ERRORS.items())
    print(f"{counts}. Mean error, exceptions left out: {errors}.")
    print(f"Within 15 %, exceptions included: {figures['within_15_percent']:.0%} of all rows that could be predicted.")
    for one in checked:
        if abs(one.error) > fit.FITS_WELL and not one.row.exception:
            print(f"{one.row.id} is {one.error:+.0%} off and has no reason yet")


def _own_run(folder: Path) -> Row:
    """Return a finished run folder as a row to fit. Raises BadInput for hardware or kernels that the model does not know."""
    result = results.read(folder)
    recipe = load_recipe(folder / "recipe.yaml")
    gpu = own_run.gpu_of(result.device)
    steps = [step for step in result.plan if step.source is None]
    formats = {name for step in steps for name in (step.gemm, *(form for _, form in step.layers))}
    if gpu is None or not steps or len(formats) != 1:
        names = ", ".join(one.name for one in hardware.all_hardware())
        ran = f"on {result.device}, with linear layers in {' and '.join(sorted(formats)) or 'no format'}"
        raise BadInput(f"run {str(folder)!r}: {ran}; allowed: one format, on {names}")
    if len({step.guided for step in steps}) != 1:
        raise BadInput(f"run {str(folder)!r}: some of its steps are without guidance; allowed: all of them, or none")
    size_of_video = {name: result.workload[name] for name in ("height", "width", "frames")}
    workload = replace_workload(recipe.effective_workload, **size_of_video)
    config = configs_of(recipe.model.checkpoint)["transformer"]
    fabric, world = device_of(gpu).fabric, result.world_size
    shape = shape_of(recipe, workload, work.size_of_expert(config), gpus=world, fabric=fabric)
    prices = own_run.prices_of_run(recipe, workload, gpu=gpu, shape=shape, kernels=result.kernels, config=config)
    computed = [prices.kernel(step.attention) for step in steps]
    for kernel in computed:
        rates.attention(kernel, gpu)
    return Row(
        id=folder.resolve().name,
        submitter="this machine",
        prices=dataclasses.replace(prices, kernels={}),
        attention={kernel: computed.count(kernel) / len(computed) for kernel in dict.fromkeys(computed)},
        gemm=formats.pop(),
        steps=len(computed),
        guided=steps[0].guided,
        denoise_only=False,
        seconds=result.generate_mean_s,
        is_mlperf=False,
        fitted=True,
        exception="",
        source=str(folder),
    )


def _as_json(checked: Sequence[Checked], skipped: Sequence[Skipped], constants: rates.Constants) -> dict[str, object]:
    return {
        "summary": fit.summary(checked),
        "constants": constants,
        "rows": [
            {
                "id": one.row.id,
                "submitter": one.row.submitter,
                "seconds": one.row.seconds,
                "predicted": one.predicted,
                "error": one.error,
                "unseen_error": one.unseen_error,
                "fitted": one.row.fitted,
                "mlperf": one.row.is_mlperf,
                "exception": one.row.exception,
                "source": one.row.source,
            }
            for one in checked
        ],
        "not_predicted": [{"id": one.id, "reason": one.reason} for one in skipped],
    }


def _write(name: str, content: object) -> None:
    try:
        atomic_write(Path(name), json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise BadInput(f"{name!r}: cannot be written ({error.strerror}); allowed: a file in a folder you can write to") from None
