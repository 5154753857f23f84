"""One line per name of a recipe: what runs it, what that does to its operands, and what a better one lacks. Without torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One name. `runs`: a key of ATTENTION or GEMM (backends.py), a reference, or "" if nothing does; `lacks`: see the module."""

    name: str
    runs: str
    numerics: str
    lacks: tuple[str, ...]


def as_table(features: Iterable[Feature], *, title: str, lacks: str) -> Table:
    """Return the features as a table for a terminal. `lacks` is the heading of the last column."""
    table = Table(title=title, show_lines=True)
    for heading in ("name", "runs", "numerics", lacks):
        table.add_column(heading, overflow="fold")
    for one in features:
        table.add_row(one.name, one.runs or "nothing", one.numerics or "-", "; ".join(one.lacks) or "nothing")
    return table
