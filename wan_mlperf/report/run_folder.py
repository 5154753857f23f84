"""Reads a run folder, and writes its report.html."""

from __future__ import annotations

from pathlib import Path

import jinja2
import yaml

from sut import result as results
from wan_mlperf import process
from wan_mlperf.errors import BadInput
from wan_mlperf.files import atomic_write
from wan_mlperf.report.pages import Run, render
from wan_mlperf.vbench import summary as vbench_summary

PAGE = "report.html"


def write(folder: Path) -> None:
    """Write a finished run's report.html. If that fails, print why: the run itself is unaffected."""
    try:
        atomic_write(folder / PAGE, render(read(folder)))
    except (OSError, ValueError, KeyError, jinja2.TemplateError) as error:
        process.say(f"no {PAGE}: {process.why(error) or process.one_line(error)}")


def read(folder: Path) -> Run:
    """Read a run folder. Raises BadInput if it is not a finished run of this version."""
    result = results.read(folder)
    file = folder / "recipe.yaml"
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
        recipe.pop("folder", None)
    except (OSError, ValueError, yaml.YAMLError, AttributeError) as error:
        raise BadInput(f"{str(file)!r}: cannot be read ({process.one_line(error)}); allowed: a run folder's recipe") from None
    vbench = vbench_summary.read(folder) if (folder / vbench_summary.FILE).is_file() else None
    return Run(folder=folder.resolve(), result=result, settings=recipe, vbench=vbench)
