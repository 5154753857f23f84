"""Texts as editors, shells and people leave them: encodings, byte order marks, line ends, other formats, streams."""

from __future__ import annotations

import codecs
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sut import loadgen, user_conf
from tests.brought.command import run as call
from tests.brought.test_arguments import refused
from wan_mlperf import Pipeline, load_recipe, run
from wan_mlperf.errors import BadInput
from wan_mlperf.generate import __main__ as generate
from wan_mlperf.inputs import text

SMALL = ["workload.steps=2", "workload.height=32", "workload.width=32", "workload.frames=5", "mesh.ranks=1"]
LIST = "a red circle\na grüner Kreis 圆\n"
PROMPTS = ["a red circle", "a grüner Kreis 圆"]


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text, "_read", {})


@pytest.mark.parametrize(
    "content",
    [
        LIST.encode(),
        codecs.BOM_UTF8 + LIST.encode(),
        codecs.BOM_UTF16_LE + LIST.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + LIST.encode("utf-16-be"),
        codecs.BOM_UTF32_LE + LIST.encode("utf-32-le"),
        LIST.replace("\n", "\r\n").encode(),
        codecs.BOM_UTF8 + LIST.encode().replace(b"\n", b"\n" + codecs.BOM_UTF8),  # files with marks, one after the other
        LIST.rstrip().encode(),
    ],
)
def test_a_list_in_any_encoding(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    assert text.read_prompts("list.txt") == PROMPTS
    end = call(run.main, "--prompts", "list.txt", "--explain", "--json")
    assert json.loads(end.out)["prompts"] == PROMPTS


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\r"])
def test_a_line_ends_at_a_newline_only(separator: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"a red{separator}circle\na square\n", newline="")
    assert text.read_prompts("list.txt") == [f"a red{separator}circle", "a square"]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.txt", b'["a red circle", "a square"]', "JSON"),
        ("a.txt", b'[\n  {"prompt": "a"}\n]\n', "JSON"),
        ("a.txt", b'{"prompt": "a"}\n{"prompt": "b"}\n', "JSON"),
        ("a.txt", b'["a red circle",\n"a square",\n]\n', "JSON"),
        ("a.txt", b'["a red circle", "a square"', "JSON"),
        ("a.txt", b'{"prompt": "a"}\n{"prompt": "b"\n', "JSON"),
        ("a.txt", b'"a red circle"\n"a square"\n', "quoted"),
        ("a.txt", b"- a red circle\n- a square\n", "YAML"),
        ("a.json", b"a red circle", "JSON"),
        ("a.csv", b"prompt,seed\na,1\n", "CSV"),
        ("a.yaml", b"- a red circle\n", "YAML"),
        ("a.txt", b"PK\x03\x04rest", "ZIP"),
        ("a.txt", b"\x1f\x8brest", "gzip"),
        ("a.txt", b"%PDF-1.7\n", "PDF"),
        ("a.txt", b"{\\rtf1\\ansi a red circle}", "RTF"),
        ("a.txt", b"<!DOCTYPE html>\n<p>a red circle", "HTML"),
        ("a.txt", "a grün\n".encode("latin-1"), "not UTF-8 text: byte 0xfc in line 1"),
        ("a.txt", "a red circle\n".encode("utf-16-le"), "NUL"),
        ("a.txt", b"a red circle\ra blue square\r", "carriage return"),
        ("a.txt", b"\xef\xbb\xbf\n \r\n", "holds no prompt"),
    ],
)
def test_another_format_is_named(name: str, content: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    refused(call(run.main, "--prompts", name), f"prompts '{name}'", word, "a text file, one prompt a line")


def test_a_text_that_only_looks_like_json(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('[cinematic] a cat\n"a quoted prompt"\n{a brace\n')
    assert text.read_prompts("a.txt") == ["[cinematic] a cat", '"a quoted prompt"', "{a brace"]


@pytest.mark.parametrize("encode", ["utf-8-sig", "utf-16"])
def test_a_user_conf_in_any_encoding(encode: str, tmp_path: Path) -> None:
    """LoadGen would skip the first setting, and so make 100 queries."""
    (tmp_path / "user.conf").write_bytes("*.SingleStream.min_query_count = 70\r\n*.*.min_duration = 0\r\n".encode(encode))
    settings = loadgen.make_settings("singlestream", "performance", tmp_path / "user.conf", 248)
    assert (settings.min_query_count, settings.min_duration_ms) == (70, 0)


def test_a_recipe_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_bytes(codecs.BOM_UTF8 + b"name: mine\r\nwarmup_queries: 3\r\n")
    assert load_recipe("my.yaml").warmup_queries == 3


def test_lines_of_other_models_are_told(tmp_path: Path) -> None:
    lines = (
        "llama2-70b.Server.target_qps = 100",
        "resnet50.Weird.unknown_key = x",
        "Wan-2.2-t2v-a14b.Offline.target_qps = 1",
        "*.Server.target_qps = 5",
        "*.Offline.target_qps = 0.5",
    )
    (tmp_path / "user.conf").write_text("\n".join(lines))
    read = user_conf.read(tmp_path / "user.conf")
    assert dict(read.values) == {"Server.target_qps": 5, "Offline.target_qps": 0.5}
    note = read.note()
    assert note is not None and "lines 1, 2, 3 for" in note and "did you mean 'wan-2.2-t2v-a14b'?" in note
    (tmp_path / "my.yaml").write_text("user_conf: user.conf\n")
    end = call(run.main, "--recipe", "my.yaml", "--explain", "--json")
    assert end.code == 0 and end.line.startswith("note: user.conf 'user.conf': lines 1, 2, 3")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "*.Offline.target_qps = 1\n\n*.Offline.target_qps = 2",
            ["'*.Offline.target_qps' is given twice, in line 1 and in line 3"],
        ),
        ("*.Offline.min_query_count = 64.5", ["min_query_count is '64.5'; allowed: a whole number"]),
        ("*.Offline.min_query_count = 64 65", ["min_query_count is '64 65'"]),
        ("*.Online.min_query_count = 64", ["scenario 'Online' is not known"]),
    ],
)
def test_settings_that_do_not_mean_what_they_say(content: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "user.conf").write_text(content)
    (tmp_path / "my.yaml").write_text("user_conf: user.conf\n")
    refused(call(run.main, "--recipe", "my.yaml"), *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("warmup_queries: 1\nname: a\nwarmup_queries: 2\n", ["'warmup_queries' is given twice, in line 1 and in line 3"]),
        ("mesh:\n  cfg: 1\n  cfg: 2\n", ["'cfg' is given twice, in line 2 and in line 3"]),
        ("a: &a {b: *a}\n", ["line 1: a value that contains itself"]),
        ("name: !!python/name:os.system x\n", ["the tag"]),
        ("base: &b {chunk: 2}\nvae:\n  <<: *b\n", ["merge key"]),
        ("name: a\n---\nname: b\n", ["not YAML"]),
        ("warmup_queries: 010\n", ["warmup_queries: '010' is not allowed"]),
        ("warmup_queries: 1:30\n", ["warmup_queries: '1:30' is not allowed"]),
        ('vae:\n  chunk: 2\nname: "a\x85b"\n', ["line 3: the character U+0085; write it as \\x85 in double quotes"]),
        ("name: a\u2028b\n", ["line 1: the character U+2028; write it as \\u2028"]),
        ("name: a\x7fb\n", ["line 1: the character U+007F"]),
    ],
)
def test_recipes_that_do_not_mean_what_they_say(content: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(content)
    refused(call(run.main, "--recipe", "my.yaml"), "recipe 'my.yaml'", *words)


def test_a_scalar_in_a_recipe_is_what_its_key_wants(tmp_path: Path) -> None:
    lines = ("name: 2026-11-26", "model: {checkpoint: no}", "compile: {experts: yes}", "attention: {early_fraction: 1e-1}")
    (tmp_path / "my.yaml").write_text("\n".join(lines))
    recipe = load_recipe("my.yaml")
    assert (recipe.name, recipe.model.checkpoint, recipe.compile.experts) == ("2026-11-26", "no", True)
    assert recipe.attention.early_fraction == 0.1


INVISIBLE = (
    "\u200b",
    "\u200b\u2060",
    "\u202e",
    "\u00ad",
    "&#8203;",
    "&zwnj;",
    "\U000e0001",
    "\u180e",
    "\u3164",
    "\u2800",
    "\u115f",
)


@pytest.mark.parametrize("prompt", ["&nbsp;", "&#32;&amp;nbsp;", " \u3000 ", "\t", *INVISIBLE])
def test_a_prompt_that_is_empty_once_cleaned(prompt: str, model: Path) -> None:
    refused(call(generate.main, prompt, "--model", str(model)), "is empty")


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Pipeline:
    return Pipeline.load(load_recipe("tiny", model=str(model), overrides=SMALL))


def made(pipeline: Pipeline, **keys: Any) -> np.ndarray:
    frames = pipeline.generate("a red circle", **keys)
    assert frames is not None
    return frames


def test_no_negative_prompt_at_all(pipeline: Pipeline, model: Path, tmp_path: Path) -> None:
    """`--negative ""` is what diffusers takes for none."""
    end = call(generate.main, "a red circle", "--negative", "", "--model", str(model), "--explain", "--json")
    assert json.loads(end.out)["workload"]["negative_prompt"] == ""
    assert not np.array_equal(made(pipeline, negative_prompt=""), made(pipeline))
    (tmp_path / "my.yaml").write_text("workload: {height: 32, width: 32, frames: 5, fps: 8, steps: 2, negative_prompt: ''}\n")
    assert load_recipe("my.yaml").effective_workload.negative_prompt == ""


def test_seeds_that_other_tools_hand_out(pipeline: Pipeline) -> None:
    largest = 2**64 - 1
    end = call(generate.main, "a", "--seed", str(largest), "--explain", "--json")
    assert json.loads(end.out)["workload"]["seed"] == largest
    assert not np.array_equal(made(pipeline, seed=largest), made(pipeline, seed=0))
    refused(call(generate.main, "a", "--seed", "-1"), "seed: -1", "a random seed", "0 to 2^64 - 1")
    refused(call(generate.main, "a", "--seed", str(2**64)), f"seed: {2**64}")


@pytest.mark.parametrize(
    ("prompt", "keys", "message"),
    [
        ("word " * 1000, {}, "tokens; allowed: at most 512"),
        ("", {}, "prompt: '' is empty"),
        ("&nbsp;", {}, "is empty"),
        (None, {}, "is a NoneType"),
        (b"a", {}, "is a bytes"),
        ("a", {"seed": -1}, "seed: -1"),
        ("a", {"seed": 2**64}, "seed"),
        ("a", {"seed": True}, "seed: True"),
        ("a", {"negative_prompt": "word " * 1000}, "negative prompt: .* at most 512"),
        ("a \udcff", {}, "not valid UTF-8"),
    ],
)
def test_from_python_as_from_the_command_line(prompt: Any, keys: dict[str, Any], message: str, pipeline: Pipeline) -> None:
    for method in (pipeline.generate, pipeline.stream):
        with pytest.raises(BadInput, match=message):
            method(prompt, **keys)
    with pytest.raises(BadInput, match="a list of at least one"):
        pipeline.stream_batch("a red circle")
    with pytest.raises(BadInput, match=r"Pipeline\.load: 'tiny' is a str; allowed: a recipe"):
        Pipeline.load("tiny")
    with pytest.raises(BadInput, match=r"overrides: 'mesh\.ranks=1' is not allowed; allowed: a list"):
        load_recipe("tiny", overrides="mesh.ranks=1")


def test_a_stream_is_read_once(tmp_path: Path) -> None:
    """As `<(command)` gives it: every reader after the first would find nothing."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(LIST,))
    writer.start()
    assert [text.read_prompts(tmp_path / "pipe") for _ in range(3)] == [PROMPTS] * 3
    writer.join()
    with pytest.raises(BadInput, match="more than"):
        text.read_prompts("/dev/zero")
