"""A run folder -> report.html, a single file without external links. Two run folders -> a comparison.

`python -m wan_mlperf.report outputs/latest` writes the page again, `python -m wan_mlperf.report A B` compares B with A.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wan_mlperf import cli, process
from wan_mlperf.errors import BadInput
from wan_mlperf.files import atomic_write
from wan_mlperf.report.pages import render, render_comparison
from wan_mlperf.report.run_folder import PAGE, read


def main(arguments: Sequence[str]) -> int:
    """Write a report or a comparison, and return the exit code."""
    parser = cli.Parser(prog="python -m wan_mlperf.report", description=__doc__)
    parser.add_argument("run", type=cli.path, metavar="A", help="a run folder, such as outputs/latest")
    parser.add_argument("other", type=cli.path, metavar="B", nargs="?", help="a second one, compared with the first")
    parser.add_argument(
        "-o", "--output", type=cli.path, metavar="FILE", help="where the page goes (default: report.html in A, compare.html in B)"
    )
    options = parser.parse_args(arguments)
    first = read(Path(options.run))
    if options.other is None:
        page, target = render(first), Path(options.run) / PAGE
    else:
        page, target = render_comparison(first, read(Path(options.other))), Path(options.other) / "compare.html"
    target = Path(options.output) if options.output else target
    try:
        atomic_write(target, page)
    except OSError as error:
        raise BadInput(
            f"{str(target)!r}: cannot be written ({error.strerror}); allowed: -o FILE in a folder you can write to"
        ) from None
    process.tell(str(target))
    return process.DONE


if __name__ == "__main__":
    process.entry(main)
