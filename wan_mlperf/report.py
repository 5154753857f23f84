"""A run folder -> report.html, one file without outside links; two run folders -> a comparison.

`python -m wan_mlperf.report outputs/latest` writes the page anew, `python -m wan_mlperf.report A B` compares B with A.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from wan_mlperf import cli
from wan_mlperf.errors import BadInput
from wan_mlperf.files import write_whole
from wan_mlperf.pages import render, render_comparison

PAGE = "report.html"


def main(arguments: Sequence[str]) -> int:
    """Write a report or a comparison; return the exit code."""
    parser = cli.Parser(prog="python -m wan_mlperf.report", description=__doc__)
    parser.add_argument("run", metavar="A", help="a run folder, such as outputs/latest")
    parser.add_argument("other", metavar="B", nargs="?", help="a second one, compared with the first")
    parser.add_argument("-o", "--output", metavar="FILE", help="where the page goes (default: report.html or compare.html in it)")
    options = parser.parse_args(arguments)
    first = read(Path(options.run))
    if options.other is None:
        page, target = render(first), Path(options.run) / PAGE
    else:
        page, target = render_comparison(first, read(Path(options.other))), Path(options.other) / "compare.html"
    target = Path(options.output) if options.output else target
    try:
        write_whole(target, page)
    except OSError as error:
        raise BadInput(
            f"{str(target)!r}: cannot be written ({error.strerror}); allowed: -o FILE in a folder you can write to"
        ) from None
    print(target)
    return cli.DONE


def write(folder: Path) -> None:
    """Write a finished run's report.html. A page that cannot be made is said, and costs the run nothing."""
    try:
        write_whole(folder / PAGE, render(read(folder)))
    except (OSError, ValueError, KeyError, jinja2.TemplateError) as error:
        cli.say(f"no {PAGE}: {cli.one_line(error)}")


def read(folder: Path) -> dict[str, Any]:
    """Return what a run folder tells: its result.json, and under "folder", "files", "vbench" what lies beside it."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadInput(f"{str(folder)!r}: no finished run ({cli.one_line(error)}); allowed: a folder with result.json") from None
    if not isinstance(result, dict) or "scenario" not in result or not isinstance(recipe, dict):
        raise BadInput(f"{str(folder)!r}: its result.json is not a run's; allowed: a run folder")
    recipe.pop("folder", None)
    summary = folder / "vbench" / "summary.json"
    vbench = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else None
    return {**result, "folder": folder.resolve(), "settings": recipe, "vbench": vbench}


if __name__ == "__main__":
    cli.entry(main)
