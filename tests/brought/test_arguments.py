"""Arguments, names and paths as people type them: taken letter by letter, or refused in one line before the work."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.brought.command import refused
from tests.brought.command import run as call
from tests.brought.mains import MAINS
from wan_mlperf import run
from wan_mlperf.generate import __main__ as generate
from wan_mlperf.recipe import load_recipe


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("generate", ["a red circle", "", "-o", "x.mp4"], ["'' is one argument too many"]),
        ("run", [""], ["'' is one argument too many"]),
        ("report", ["a", "b", ""], ["'' is one argument too many"]),
        ("vbench", ["a", ""], ["'' is one argument too many"]),
        ("submit", ["system", "a", "-o", "b", ""], ["'' is one argument too many"]),
        ("doctor", [""], ["'' is one argument too many"]),
        ("generate", ["a", "red", "circle"], ["in quotes", "'a red circle'"]),
        ("generate", ["a", "-o", "x.mp4", "red"], ["in quotes", "'a red'"]),
        ("generate", ["a", "--prompt", "b"], ["'--prompt'", "did you mean '--prompts'?"]),  # no abbreviations
        ("generate", ["a", "--negative", "-dark"], ["--negative=VALUE"]),
        ("run", ["--senario=offline"], ["'--senario=offline'", "did you mean '--scenario'?"]),
        ("generate", ["a", "--steps", "4_2"], ["--steps: invalid int value: '4_2'"]),
        ("generate", ["a", "--frames", "\u0665"], ["--frames: invalid int value: '\u0665'"]),
        ("generate", ["a", "--seed", "1e3"], ["--seed: invalid int value: '1e3'"]),
        ("predict", ["--gpus", "8_0"], ["--gpus: invalid int value: '8_0'"]),
        ("search", ["--forwards", "nan"], ["--forwards: invalid float value: 'nan'"]),
        ("search", ["--seconds", "\u0665"], ["--seconds: invalid float value"]),
        ("bench", ["speed", "--rounds", " 5"], ["--rounds: invalid int value: ' 5'"]),
        ("serve", ["--port", "8_000"], ["--port: invalid int value: '8_000'"]),
        ("predict", ["--hardware", "\udcff"], ["not valid UTF-8"]),
        ("submit", ["pack", "c", "--submitter", "\udcff"], ["not valid UTF-8"]),
    ],
)
def test_arguments_that_do_not_fit(command: str, arguments: list[str], words: list[str]) -> None:
    refused(call(MAINS[command], *arguments), *words)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("generate", ["a", "-o", ""]),
        ("generate", ["--prompts", ""]),
        ("generate", ["a", "--model", ""]),
        ("run", ["--recipe", ""]),
        ("run", ["--outputs", ""]),
        ("report", [""]),
        ("vbench", [""]),
        ("submit", ["run", "--campaign", ""]),
        ("predict", ["--recipe", ""]),
        ("predict", ["--json", ""]),
        ("predict", ["fit", "--run", ""]),
        ("search", ["-o", ""]),
        ("search", ["--on", ""]),
        ("bench", ["fidelity", "--outputs", ""]),
        ("serve", ["--folder", ""]),
    ],
)
def test_an_empty_path_is_no_default(command: str, arguments: list[str]) -> None:
    refused(call(MAINS[command], *arguments), "'' is empty")


@pytest.mark.parametrize(
    "name", ["2000", "yes", "null", "~", "wan: final", "[ft] wan", "{a}", "@step", "ft #3", "1e3", "a=b", "'q'"]
)
def test_a_model_is_a_path_and_never_yaml(name: str, model: Path, tmp_path: Path) -> None:
    """What YAML takes for a number, a boolean, a mapping or a comment; and beside it a folder that is not meant."""
    (tmp_path / "ft").symlink_to(model)
    place = tmp_path / name if name != "~" else tmp_path / "home"
    place.symlink_to(model)
    os.environ["HOME"], home = str(tmp_path / "home"), os.environ.get("HOME", "")
    try:
        end = call(generate.main, "a red circle", f"--model={name}", "--explain", "--json")
        from_set = call(generate.main, "a red circle", f"--set=model.checkpoint={name}", "--explain", "--json")
    finally:
        os.environ["HOME"] = home
    assert end.code == from_set.code == 0, end.err + from_set.err
    wanted = str(tmp_path / "home") if name == "~" else name
    assert json.loads(end.out)["recipe"]["model"]["checkpoint"] == wanted
    assert json.loads(from_set.out)["recipe"]["model"]["checkpoint"] == name
    if name != "~":
        place.unlink()
        refused(call(generate.main, "a red circle", f"--model={name}"), "no such folder")


def test_a_tilde_is_the_home_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").symlink_to(model)
    (tmp_path / "list.txt").write_text("a red circle\n")
    (tmp_path / "my.yaml").write_text(
        Path(load_recipe("tiny").folder, "tiny.yaml").read_text().replace("mlperf/", f"{load_recipe('tiny').folder}/mlperf/")
    )
    end = call(run.main, "--model=~/mine", "--prompts=~/list.txt", "--recipe=~/my.yaml", "--outputs=~/out", "--explain", "--json")
    assert end.code == 0, end.err
    understood = json.loads(end.out)
    assert understood["outputs"] == str(tmp_path / "out") and understood["prompts"] == ["a red circle"]
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr("os.path.expanduser", lambda text: text)
    refused(call(generate.main, "a", "--model=~/mine"), "no home folder")


def test_a_folder_named_tilde_is_not_the_home_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/none")
    (tmp_path / "~").symlink_to(model)
    end = call(generate.main, "a red circle", "--model=./~", "--explain", "--json")
    assert end.code == 0, end.err
    assert json.loads(end.out)["recipe"]["model"]["checkpoint"] == str(tmp_path / "~")


@pytest.mark.parametrize(
    "text",
    [
        "low quality # watermark",
        "blurry: bad hands",
        "no",
        "null and void",
        "2000",
        "[a]",
        "{a: b}",
        "'q'",
        " a ",
        "*x",
        "&x",
        "-",
    ],
)
def test_text_stays_text(text: str) -> None:
    end = call(run.main, f"--set=workload.negative_prompt={text}", "--explain", "--json")
    assert end.code == 0, end.err
    assert json.loads(end.out)["workload"]["negative_prompt"] == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("vae.chunk=2", 2),
        ("vae.chunk=0x2", 2),
        ("compile.experts=yes", True),
        ("compile.experts=off", False),
        ("attention.early_fraction=1e-1", 0.1),
        ("attention.early_fraction=1", 1.0),
        ("mesh.ulysses=auto", "auto"),
        ("mesh.ulysses=2", 2),
        ("model.fixed_latent=null", None),
        ("gemm.keep=[[blocks.0.*, bf16]]", [["blocks.0.*", "bf16"]]),
    ],
)
def test_a_value_is_of_its_keys_type(override: str, value: object) -> None:
    end = call(run.main, f"--set={override}", "--explain", "--json")
    assert end.code == 0, end.err
    found = json.loads(end.out)["recipe"]
    for key in override.partition("=")[0].split("."):
        found = found[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "override",
    [
        "vae.chunk=010",
        "vae.chunk=1_0",
        "vae.chunk=1:30",
        "vae.chunk=4 # four",
        "compile.experts=1",
        "vae.chunk=4.0",
        "faults.dead_s=.inf",
        "attention.early_fraction=nan",
    ],
)
def test_yaml_1_1_traps_are_refused(override: str) -> None:
    refused(call(run.main, f"--set={override}"), override.partition("=")[0], "is not allowed")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("predict", ["--hardware=mi355x", "--html"]),
        ("predict", ["fit", "--write"]),
        ("bench", ["embedded", "--json"]),
        ("bench", ["decode", "--json"]),
        ("generate", ["a", "-o"]),
    ],
)
def test_a_file_to_write_is_tried_before_the_work(command: str, arguments: list[str], tmp_path: Path) -> None:
    """A folder, a folder that is a file, a link to nowhere."""
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link.mp4").symlink_to("missing/x.mp4")
    for name in ("folder.mp4", "file/x.mp4", "link.mp4"):
        refused(call(MAINS[command], *arguments, name), name.partition("/")[0])
    assert sorted(os.listdir()) == ["file", "folder.mp4", "link.mp4"]
