"""Entry: is this host set up for the run, and which kernel would each name of a recipe take?

Exit code 1 if something that the run needs is missing; a value that only costs speed is a warning.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wan_mlperf import cli, process
from wan_mlperf.doctor import kernels
from wan_mlperf.doctor.checks import engine, examine, summary
from wan_mlperf.doctor.host_checks import Check, find_gpus
from wan_mlperf.kernels.features import as_table


def show(checks: tuple[Check, ...], console: Console) -> None:
    if console.is_terminal:
        table = Table("", "check", "value", "recommended", "read")
        colours = {"ok": "green", "warn": "yellow", "missing": "red"}
        for check in checks:
            texts = map(escape, (check.name, check.value, check.recommended, check.source))
            table.add_row(f"[{colours[check.ok]}]{check.ok}[/]", *texts)
        console.print(table)
        for check in checks:  # below the table, where a command is never cut to a column
            if check.ok != "ok":
                console.print(f"{check.name}: {check.fix}", markup=False, highlight=False, soft_wrap=True)
    else:
        for check in checks:
            wanted = f"  (recommended: {check.recommended}; read: {check.source}; to change it: {check.fix})"
            process.tell(f"{check.ok:<8}{check.name:<24}{check.value}{'' if check.ok == 'ok' else wanted}")
    process.tell(summary(checks))


def main(arguments: Sequence[str]) -> int:
    parser = cli.Parser(prog="python -m wan_mlperf.doctor", description="Is this host set up for the run?")
    parser.add_argument("--json", action="store_true", help="print every check as JSON")
    parser.add_argument("--outputs", type=cli.path, default="outputs", help="where run folders go")
    options = parser.parse_args(arguments)
    asked = kernels.ask()
    checks = (*examine(outputs=Path(options.outputs)), engine(find_gpus(Path("/")), asked.device, asked.problem))
    ready = all(check.ok != "missing" for check in checks) and not asked.without
    if options.json:
        listed = [asdict(check) for check in checks]
        print(json.dumps({"ok": ready, "verdict": summary(checks), "checks": listed, **asdict(asked)}, indent=2))
    else:
        show(checks, Console())
        if not asked.problem:
            title = f"kernels, recipe {asked.recipe}"
            cli.console(width=150).print(as_table(asked.kernels, title=title, lacks="why no better one"))
        if asked.without:
            process.tell(f"kernels missing for recipe {asked.recipe}: {', '.join(asked.without)}")
    return process.DONE if ready else process.INVALID


if __name__ == "__main__":
    process.entry(main)
