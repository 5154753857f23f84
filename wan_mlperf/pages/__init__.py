"""What our HTML pages share: the look (base.html), macros and drawings. A page is a single file without outside links."""

from __future__ import annotations

from pathlib import Path

import jinja2

from wan_mlperf.pages import charts


def template(folder: Path, name: str) -> jinja2.Template:
    """Return a template from a package's `folder`. It may extend base.html and use macros.html."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["seconds"] = charts.seconds
    return environment.get_template(name)
