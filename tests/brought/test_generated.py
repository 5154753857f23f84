"""Generated input with a known meaning: what is understood is what was meant, or one line says why not (exit code 2).

A small number of each runs in `make test`, the whole number in `make test-all`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sut import loadgen, user_conf
from tests.brought.command import run as call
from tests.brought.generate_input import KEYS, REFUSED, encoded, examples, few, means, names, numbers, recipes, texts
from wan_mlperf import checkpoint, run
from wan_mlperf.errors import BadInput
from wan_mlperf.generate import __main__ as generate
from wan_mlperf.inputs import text
from wan_mlperf.inputs.strict_yaml import INVISIBLE
from wan_mlperf.recipe import load_recipe

WORKLOAD: dict[str, Any] = {
    "seed": (0, 2**64 - 1, 1, 0),
    "steps": (1, 1000, 1, 0),
    "frames": (1, 1025, 4, 1),
}


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model, which is the same in every example, is verified once."""
    known: set[str] = set()
    verify = checkpoint.verify_folder

    def once(folder: Path) -> None:
        if (real := os.path.realpath(folder)) not in known:
            verify(folder)
            known.add(real)

    monkeypatch.setattr(checkpoint, "verify_folder", once)


def flag(draw: st.DrawFn, name: str, value: str) -> list[str]:
    """`--name=value` or `--name value`."""
    return [f"{name}={value}"] if value.startswith("-") or draw(st.booleans()) else [name, value]


@st.composite
def settings_of(draw: st.DrawFn) -> tuple[list[list[str]], dict[str, Any]]:
    """--set arguments, and "recipe.key" -> what is meant."""
    words, meant = [], {}
    for key in draw(st.lists(st.sampled_from(sorted(KEYS)), unique=True, max_size=3)):
        written, value = draw(KEYS[key].written)
        words.append(flag(draw, "--set", f"{key}={written}"))
        meant[f"recipe.{key}"] = value
    return words, meant


@st.composite
def of_generate(draw: st.DrawFn) -> tuple[list[str], dict[str, Any]]:
    words, meant = draw(settings_of())
    for name, (least, most, step, first) in WORKLOAD.items():
        if draw(st.booleans()):
            written, value = draw(numbers(least, most, step=step, first=first))
            words.append(flag(draw, f"--{name}", written))
            meant[f"workload.{name}"] = value
    if draw(st.booleans()):
        sides = [draw(numbers(16, 4096, step=16)) for _ in range(2)]
        words.append(flag(draw, "--size", draw(st.sampled_from("xX")).join(written.lower() for written, _ in sides)))
        plain = all(written.isascii() and written.isdigit() for written, _ in sides)
        for name, (written, value) in zip(("height", "width"), sides, strict=True):
            digits = int(written) if plain else None
            meant[f"workload.{name}"] = value if value is not REFUSED or digits is None or digits % 16 else digits or REFUSED
    if draw(st.booleans()):
        negative = draw(texts)
        words.append(flag(draw, "--negative", negative))
        meant["workload.negative_prompt"] = negative
    prompt = draw(texts)
    words.append([prompt])
    meant["prompts"] = [prompt]
    words = draw(st.permutations(words))
    if prompt.startswith("-"):
        words = [one for one in words if one != [prompt]] + [["--", prompt]]
    return [word for one in words for word in one], meant


def look(found: Any, key: str) -> Any:
    parts = key.split(".")
    for part in parts:
        found = found[part]
    return found


def agrees(main: Callable[..., int], words: list[str], meant: dict[str, Any]) -> None:
    """The round trip."""
    end = call(main, *words, "--explain", "--json")
    told = f"{words}: {end}"
    assert "Traceback" not in end.err, told
    if any(value is REFUSED for value in meant.values()):
        assert end.code == 2 and end.line.startswith("error: ") and not end.out, told
        return
    if end.code == 2:  # values that are allowed one by one may not fit together; the line must be about that
        assert any(word in end.line for word in ("needs", "with", "below", "cannot both")), told
        return
    assert end.code == 0, told
    found = json.loads(end.out)
    for key, value in meant.items():
        assert means(look(found, key), value), f"{key}: {look(found, key)!r}, meant {value!r}; {told}"


@few(30, 600)
def test_command_lines_of_generate(number: int, model: Path, verified_once: None) -> None:
    @examples(number)
    @given(line=of_generate())
    def each(line: tuple[list[str], dict[str, Any]]) -> None:
        words, meant = line
        agrees(generate.main, ["--model", str(model), *words] if "--" in words else [*words, "--model", str(model)], meant)

    each()


@few(15, 400)
def test_command_lines_of_run_with_names_of_any_kind(number: int, model: Path, tmp_path: Path, verified_once: None) -> None:
    @examples(number)
    @given(chosen=settings_of(), data=st.data(), name=names, outputs=names)
    def each(chosen: Any, data: st.DataObject, name: str, outputs: str) -> None:
        words, meant = chosen
        place = tmp_path / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        os.chdir(place)
        (place / name).symlink_to(model)
        (place / f"{name[:60]}.txt").write_text("a red circle\n")
        is_home = name == "~" or (name.startswith("~") and os.path.expanduser(name) != name)
        prefix = "./" if is_home or data.draw(st.booleans()) else ""
        words = [
            *(word for one in words for word in one),
            f"--model={prefix}{name}",
            f"--prompts=./{name[:60]}.txt",
            f"--outputs=./{outputs}",
            f"--scenario={data.draw(st.sampled_from(['singlestream', 'offline']))}",
        ]
        meant |= {"recipe.model.checkpoint": str(Path(f"{prefix}{name}")), "prompts": ["a red circle"]}
        if prefix and name.startswith("~"):
            meant["recipe.model.checkpoint"] = str(place / name)
        meant |= {"outputs": str(place / outputs if outputs.startswith("~") else Path(outputs))}
        meant["scenario"] = words[-1].partition("=")[2]
        if Path(f"{prefix}{name}") in (Path("embedded"), Path(checkpoint.HUB_NAME)):
            return
        agrees(run.main, words, meant)

    each()


@few(40, 500)
def test_recipes(number: int, tmp_path: Path) -> None:
    @examples(number)
    @given(recipe=recipes(), data=st.data())
    def each(recipe: tuple[list[str], dict[str, Any]], data: st.DataObject) -> None:
        lines, meant = recipe
        file = tmp_path / "my.yaml"
        file.write_bytes(data.draw(encoded(lines)))
        try:
            found = load_recipe(file)
        except BadInput as error:
            assert "\n" not in str(error) and "line " in str(error), (lines, error)
            raw = "".join(lines)
            assert INVISIBLE.search(raw), (lines, error)
            return
        for key, value in meant.items():
            place: Any = found
            for part in key.split("."):
                place = getattr(place, part)
            assert place == value and type(place) in (type(value), float), f"{key}: {place!r}, meant {value!r}; {lines}"

    each()


@few(30, 300)
def test_prompt_lists(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_read", {})

    @examples(number)
    @given(prompts=st.lists(texts, max_size=5), data=st.data())
    def each(prompts: list[str], data: st.DataObject) -> None:
        file = tmp_path / "list.txt"
        file.write_bytes(data.draw(encoded(prompts)))
        meant = [one for one in (prompt.lstrip("\ufeff").strip() for prompt in prompts) if one]
        try:
            assert text.read_prompts(file) == meant
        except BadInput as error:
            told = str(error)
            assert "\n" not in told and (not meant or any(one in told for one in ("JSON", "HTML", "RTF"))), (prompts, told)

    each()


@few(20, 200)
def test_user_confs(number: int, tmp_path: Path) -> None:
    keys = st.sampled_from(["min_query_count", "min_duration", "target_qps", "target_latency"])
    models, scenarios = (
        st.sampled_from(["*", "wan-2.2-t2v-a14b", "llama2-70b"]),
        st.sampled_from(["*", "SingleStream", "Offline"]),
    )

    @examples(number)
    @given(chosen=st.dictionaries(st.tuples(models, scenarios, keys), st.integers(1, 10**6), max_size=6), data=st.data())
    def each(chosen: dict[tuple[str, str, str], int], data: st.DataObject) -> None:
        blanks, comments = st.sampled_from(["", " ", "\t"]), st.sampled_from(["", "  # a comment = 5", "#"])
        lines = []
        for (model, scenario, key), value in chosen.items():
            lines.append(
                f"{data.draw(blanks)}{model}.{scenario}.{key}{data.draw(blanks)}={data.draw(blanks)}{value}{data.draw(comments)}"
            )
        file = tmp_path / "user.conf"
        file.write_bytes(data.draw(encoded(lines)))
        found = user_conf.read(file).values
        meant = {f"{scenario}.{key}": value for (model, scenario, key), value in chosen.items() if model != "llama2-70b"}
        assert set(found) == set(meant)
        settings = loadgen.make_settings("singlestream", "performance", file, 248)
        counts = [
            value
            for (model, scenario, key), value in chosen.items()
            if key == "min_query_count" and scenario == "SingleStream" and model != "llama2-70b"
        ]
        if len(counts) == 1:
            assert settings.min_query_count == counts[0]

    each()
