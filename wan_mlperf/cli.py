"""What the commands share: flags, a console, and a progress bar."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from wan_mlperf import files, process, ranks
from wan_mlperf.errors import BadInput, did_you_mean
from wan_mlperf.inputs import paths
from wan_mlperf.inputs.values import number, whole_number

if TYPE_CHECKING:
    from rich.console import Console

    from wan_mlperf.recipe import Recipe
    from wan_mlperf.workload import Workload


class Parser(argparse.ArgumentParser):
    """argparse whose errors are BadInput: one line, with a suggestion for a misspelt flag. Flags cannot be abbreviated.

    Every text, int and float of every command is read by `words`, `whole_number` and `number`.
    """

    def __init__(self, **more: Any) -> None:
        super().__init__(**{**more, "allow_abbrev": False})
        readers: tuple[tuple[Any, Any], ...] = ((None, words), (int, whole_number), (float, number))
        for kind, reader in readers:
            self.register("type", kind, reader)
        self._parsed = argparse.Namespace(), [""]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and keep the unknown arguments for `error`, which would otherwise get them joined into one text."""
        self._parsed = super().parse_known_args(args, namespace)
        return self._parsed

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        if message.startswith("unrecognized arguments"):
            raise BadInput(self._left_over())
        hint = ""
        if "expected one argument" in message:
            flag = message.partition("argument ")[2].partition(":")[0].split("/")[-1]
            hint = f" (a value that begins with '-' is written {flag}=VALUE)"
        raise BadInput(f"{message}{hint}; see --help")

    def _left_over(self) -> str:
        options, left = self._parsed
        flags = [one for one in left if one.startswith("-") and len(one) > 1]
        if flags:
            known = self._flags()
            if late := [flag for flag in flags if flag.partition("=")[0] in known]:
                raise BadInput(f"{late[0]!r} comes after '--', where nothing is a flag; allowed: flags before it")
            listed = ", ".join(f"{flag!r}{did_you_mean(flag.partition('=')[0], known)}" for flag in flags)
            return f"not among the flags: {listed}; see --help"
        prompt = getattr(options, "prompt", None)
        if prompt and any(one.strip() for one in left):
            whole = " ".join([prompt, *left])
            return f"prompt {prompt!r} is followed by {' '.join(left)!r}; allowed: one prompt, in quotes: {whole!r}"
        return f"{left[0]!r} is one argument too many; see --help"

    def _flags(self) -> list[str]:
        found: list[str] = []
        for action in self._actions:
            found += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                found += [flag for one in action.choices.values() for inner in one._actions for flag in inner.option_strings]
        return found


def path(text: str) -> str:
    """Type of an argument that is a path: `~` expanded, not empty, and not too long for the file system."""
    try:
        found = paths.expand(text, what="path")
        paths.look(found, what="path")
        # `./~` is a folder of this name, and must not become the home folder where the path is used.
        return str(found.absolute() if str(found).startswith("~") and not text.startswith("~") else found)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def output_file(text: str) -> str:
    """Type of an argument that is a file to write: like `path`, and checked now, before the work, to be writable."""
    found = path(text)
    try:
        return str(files.writable_file(Path(found), what="path"))
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def check_outputs(outputs: Mapping[str, str | None]) -> None:
    """Raise BadInput if two flags (flag -> file) write the same file. A device, such as /dev/null, takes both."""
    seen: dict[Path, str] = {}
    for flag, name in outputs.items():
        if name is None or (Path(name).exists() and not Path(name).is_file()):
            continue
        other = seen.setdefault(Path(name).resolve(), flag)
        if other != flag:
            raise BadInput(f"{other} and {flag}: {name!r} is the same file; allowed: one file for each")


def words(text: str) -> str:
    """Type of an argument that is text: it must be valid UTF-8, because libraries refuse anything else."""
    try:
        return paths.utf8(text, what="text")
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose and change a recipe, the same for every command."""
    default = "the one for this device and scenario"
    parser.add_argument("--recipe", type=path, help=f"a YAML file or a name from configs/ (default: {default})")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key of the recipe")
    parser.add_argument("--model", type=path, help="embedded, the hub name, or a Diffusers folder")
    parser.add_argument("--exact", action="store_true", help="turn every approximation off")


def check_recipe(options: argparse.Namespace) -> None:
    """Check the recipe that the flags name, if they name one, before torch is imported for anything else. Raises BadInput."""
    if options.recipe is not None and not ranks.under_torchrun():  # all ranks of a job check together
        from wan_mlperf.recipe import load_recipe

        load_recipe(options.recipe, overrides=options.set, model=options.model, exact=options.exact)


def workload_changes(size: str | None, **others: object) -> dict[str, object]:
    """Return the workload fields that flags change: `size` is HEIGHTxWIDTH, None a flag that was not given. Raises BadInput."""
    changed = {name: value for name, value in others.items() if value is not None}
    if size is not None:
        height, _, width = size.lower().partition("x")
        if not (height.isascii() and height.isdigit() and width.isascii() and width.isdigit()):
            raise BadInput(f"--size: {size!r} is not allowed; allowed: HEIGHTxWIDTH, such as 720x1280")
        changed |= {"height": int(height), "width": int(width)}
    return changed


def add_arch_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the flag that names an architecture; `what` says what is done for it."""
    parser.add_argument("--as", dest="arch", metavar="ARCH", help=f"{what} (gfx950, gfx942, sm90, sm100, ...)")


def console(*, width: int = 120, file: TextIO | None = None) -> Console:
    """Return the console for tables. Users' names are printed literally: no markup, no emoji, no colours.

    `width` is used without a terminal, so that tables are not folded.
    """
    from rich.console import Console

    stream = file or sys.stdout
    fixed = None if file is None and stream.isatty() else width
    return Console(file=stream, width=fixed, markup=False, emoji=False, highlight=False)


def explain(recipe: Recipe, workload: Workload, command: Mapping[str, object], *, as_json: bool, arch: str | None = None) -> int:
    """Print what would be done, and return the exit code. Reads no weights. `command`: settings outside the recipe.

    It shows what each kernel name of the plan stands for on this machine, or with `arch` on that architecture, and then also
    what of it is missing here.
    """
    from pydantic import TypeAdapter

    from wan_mlperf import preflight, step_plan
    from wan_mlperf.kernels.features import as_table
    from wan_mlperf.parallel import survey

    config, source = preflight.scheduler_of(recipe.model.checkpoint)
    plan = step_plan.make_plan(recipe, workload, config)
    features, where = survey.of(recipe, plan) if arch is None else survey.there(recipe, plan, arch)
    if not ranks.is_first():
        return process.DONE
    if as_json:
        values = {
            **command,
            "recipe": TypeAdapter(type(recipe)).dump_python(recipe, mode="json"),
            "workload": dataclasses.asdict(workload),
            "scheduler": {**config, "from": source},
            "plan": [dataclasses.asdict(step) for step in plan],
            "device": where,
            "kernels": [dataclasses.asdict(one) for one in features],
        }
        print(json.dumps(values, indent=1), flush=True)  # in ASCII, so that no terminal's encoding changes it
        return process.DONE
    title = f"{process.shown(recipe.name)}, {config['_class_name']} of {source}"
    shown, kernels = console(width=150), {one.name: one.runs for one in features}
    shown.print(step_plan.as_table(plan, title=f"{title}, on {where}", kernels=kernels))
    shown.print(as_table(features, title="kernels", lacks="missing here" if arch else "why no better one"))
    return process.DONE


class Progress:
    """A progress bar on rank 0's terminal. Without a terminal one line per tenth; on other ranks nothing."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = process.shown(title), max(1, total), 0
        self._shown = ranks.is_first()
        self._bar: Any = None
        if self._shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total)

    @property
    def done(self) -> int:
        """Number of items done."""
        return self._done

    def advance(self) -> None:
        """Count one more item as done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, total=max(self._total, self._done))
        elif self._shown and (self._done * 10 // self._total > (self._done - 1) * 10 // self._total):
            process.say(f"{self._title}: {self._done}/{self._total}")

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
