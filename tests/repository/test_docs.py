"""README and docs/: commands parse, paths exist, and each figure is in a file of docs/results/ that its section links."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from tests.conftest import ROOT
from tests.repository.test_import_rules import sources
from wan_mlperf.published import published
from wan_mlperf.recipe import load_recipe

RESULTS = ROOT / "docs" / "results"
QUOTING = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
CARDS = [ROOT / "wan_mlperf" / "embedded" / "README.md", ROOT / "tools" / "train_embedded" / "README.md"]
PAGES = [*QUOTING, ROOT / "CONTRIBUTING.md", *sorted(RESULTS.glob("*.md")), *CARDS]
# What is somebody else's command; a block with it is only checked for the shell's grammar.
FOREIGN = {"pip", "git", "head=$(scontrol", "pre-commit", "docker", "export", "cd", "curl"}

UNITS = r"%|s|ms|min|minutes|hours|[KMG]i?B|[KMGT]B/s|[PTG]FLOPs?(?:/s)?|dB|times|samples/s|TFLOP/s"
# A number with a unit, with a point, with a separator of thousands, or with an exponent.
FIGURE = re.compile(rf"(?<![\w.,-])(\d+(?:,\d{{3}})+|\d+\.\d+(?:e-?\d+)?|\d+e-?\d+|\d+(?=\s(?:{UNITS})(?!\w)))(?![\w.]*\d)")
NUMBER = re.compile(r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?!\w)")
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


class Parsed(Exception):
    """A command's parser took its arguments."""


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of each fenced block."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in a page's blocks, and of each piece of inline code that begins like one."""
    lines = [line for language, text in blocks(page) if language == "sh" for line in text.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:python|make|torchrun|pytest) [^`]+)`", page.read_text(encoding="utf-8"))
    for line in lines:
        for one in line.split(" && "):
            words = shlex.split(one, comments=True)
            if words[:1] == ["srun"]:
                words = words[1:]
            if words:
                yield words


def module_of(words: list[str]) -> tuple[str, list[str]] | None:
    """(module, arguments) of `python -m ...` and `torchrun ... -m ...`; torchrun's own parser reads its flags."""
    if words[0] == "torchrun":
        parsed = get_args_parser().parse_args(words[1:])
        assert parsed.module or (ROOT / parsed.training_script).is_file(), words
        return (parsed.training_script, parsed.training_script_args) if parsed.module else None
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    return None


def check_module(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the module's `main` until its parser has taken the arguments, and check the recipe that they name."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, name
    if name.startswith("tests."):  # it reads its arguments without a parser
        return
    module = importlib.import_module(f"{name}.__main__" if spec.submodule_search_locations else name)
    parse = argparse.ArgumentParser.parse_args

    def until_parsed(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        raise Parsed(parse(self, *args, **kwargs))

    with monkeypatch.context() as patch, pytest.raises(Parsed) as reached:
        patch.setattr(argparse.ArgumentParser, "parse_args", until_parsed)
        patch.setattr("sys.argv", [name, *arguments])
        module.main(arguments) if module.main.__code__.co_argcount else module.main()
    options = vars(reached.value.args[0])
    overrides = [*(options.get("set") or []), *(part for case in options.get("case") or [] for part in case.split(","))]
    named = options.get("recipe") or (["tiny"] if overrides else [])
    for recipe in named if isinstance(named, list) else [named]:  # predict compares several
        load_recipe(recipe, overrides=overrides)


def test_commands_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    count = 0
    for page in PAGES:
        for words in commands(page):
            count += 1
            words = words[2:] if words[:3] == ["python", "-m", "pytest"] else words
            command = module_of(words)
            if command is not None:
                check_module(*command, monkeypatch)
            elif words[0] == "make":
                assert {word for word in words[1:] if "=" not in word} <= targets, words
            elif words[0] == "python":
                assert (ROOT / words[1]).is_file(), words
            elif words[0] == "pytest":
                assert all((ROOT / word).exists() for word in words[1:] if word.startswith("tests")), words
            else:
                assert words[0] in FOREIGN | {"torchrun"}, f"{page.name}: {words}"
            for word in words:
                if re.match(r"(configs|docs|tests|examples|tools)/", word) and "contact-sheet" not in word:
                    assert (ROOT / word).exists(), word
    assert count > 40
    with pytest.raises(Exception, match="did you mean '--scenario'"):
        check_module("wan_mlperf.run", ["--scenaro", "offline"], monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_what_they_say(page: Path) -> None:
    for language, text in blocks(page):
        assert language in ("sh", "text", "python", "yaml"), f"a block of {page.name} does not say what it is"
        if language == "sh":
            subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        elif language == "python":
            ast.parse(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in LINK.findall(text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for name in re.findall(r"`((?:wan_mlperf|sut|configs|docs|tests|tools|examples)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


def sections(page: Path) -> Iterator[str]:
    """A page's parts, each from a heading to the next, without commands and inline code: a setting is written as code."""
    text = re.sub(r"^```(?!text)\w*\n.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    yield from re.split(r"^(?=#+ )", re.sub(r"`[^`\n]+`", "", text), flags=re.M)


def figures(section: str) -> set[str]:
    """What a section states as measured: numbers with a unit, point or exponent, and those in a table after its first column."""
    prose = re.sub(r"\]\([^)]*\)", "]", re.sub(r"(Python|torch|vbench|Apache-|version) ?\d[\d.]*", "", section))
    found = set(FIGURE.findall(prose))
    for line in re.findall(r"^\|(.*)\|$", prose, re.M):
        for cell in line.split("|")[1:]:
            found.update(NUMBER.findall(cell))
    return found


@pytest.mark.parametrize("page", QUOTING, ids=lambda page: page.name)
def test_every_figure_is_in_a_linked_result(page: Path) -> None:
    for section in sections(page):
        files = [(page.parent / target).resolve() for target in LINK.findall(section) if not target.startswith("http")]
        there = set().union(*(NUMBER.findall(file.read_text(encoding="utf-8")) for file in files if file.parent == RESULTS))
        missing = figures(section) - there
        assert not missing, f"{page.name}, {section.splitlines()[0]!r}: {sorted(missing)} are in no linked file of docs/results/"


def test_figures_are_seen() -> None:
    text = "In 0.5 s, 27,112 MB or 100 % of 8 GPUs: 3 times 5e-7, not torch 2.13.0, MI355X, v6.1 or 720p.\n| 1 | 2 | 3.50 s |\n"
    assert figures(text) == {"0.5", "27,112", "100", "3", "5e-7", "2", "3.50"}


@pytest.mark.parametrize("file", sorted(set(RESULTS.glob("*.md")) - {RESULTS / "README.md"}), ids=lambda file: file.name)
def test_a_result_says_how_it_was_measured(file: Path) -> None:
    text = file.read_text(encoding="utf-8").lower()
    assert re.search(r"2026-\d\d-\d\d|november 2026", text)
    assert all(word in text for word in ("machine", "date")) and any(word in text for word in ("command", "```sh", "source"))
    assert f"({file.name})" in (RESULTS / "README.md").read_text(encoding="utf-8"), "docs/results/README.md does not list it"


def test_the_published_table_is_the_data() -> None:
    rows = [line for line in (RESULTS / "published.md").read_text().splitlines() if line.startswith("| v6")]
    assert len(rows) == len(published())
    for one in published():
        (row,) = [row for row in rows if f"| {one.round} | {one.system}{' *' * (one.harness == 'endpoints')} |" in row]
        numbers = [one.score_s, one.p90_s, one.p99_s, one.samples_per_second, one.vbench_singlestream, one.vbench_offline]
        assert [float(text) for text in re.findall(r"\d+\.\d+", row.split("|", 3)[3])] == [n for n in numbers if n is not None]


def test_the_readme_is_one_page() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 120


def test_the_map_shows_the_house() -> None:
    (layout,) = [text for _, text in blocks(ROOT / "docs" / "design.md") if "wan_mlperf/run.py" in text]
    names = {name.split("/")[1] + ("/" if name.count("/") > 1 else "") for name in sources() if name.startswith("wan_mlperf/")}
    words = set(layout.split())
    missing = sorted(names - {"__init__.py", "run.py"} - words)
    assert not missing, f"docs/design.md: the layout does not show {missing}"
