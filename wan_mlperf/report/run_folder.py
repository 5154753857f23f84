"""A run folder: what it tells, and its report.html."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import yaml

from wan_mlperf import process
from wan_mlperf.errors import BadInput
from wan_mlperf.files import atomic_write
from wan_mlperf.report.pages import render

PAGE = "report.html"


def write(folder: Path) -> None:
    """Write a finished run's report.html. A page that cannot be made is said, and costs the run nothing."""
    try:
        atomic_write(folder / PAGE, render(read(folder)))
    except (OSError, ValueError, KeyError, jinja2.TemplateError) as error:
        process.say(f"no {PAGE}: {process.one_line(error)}")


def read(folder: Path) -> dict[str, Any]:
    """Return what a run folder tells: its result.json, and under "folder", "files", "vbench" what lies beside it."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadInput(
            f"{str(folder)!r}: no finished run ({process.one_line(error)}); allowed: a folder with result.json"
        ) from None
    if not isinstance(result, dict) or "scenario" not in result or not isinstance(recipe, dict):
        raise BadInput(f"{str(folder)!r}: its result.json is not a run's; allowed: a run folder")
    recipe.pop("folder", None)
    summary = folder / "vbench" / "summary.json"
    vbench = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else None
    return {**result, "folder": folder.resolve(), "settings": recipe, "vbench": vbench}
