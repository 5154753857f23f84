"""Names as people give them to files, folders and recipes: taken and printed letter by letter, or refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from pydantic import TypeAdapter

from tests.brought.command import SMALL, refused
from tests.brought.command import run as call
from tests.run_folders import result
from wan_mlperf import run
from wan_mlperf.errors import BadInput
from wan_mlperf.generate import __main__ as generate
from wan_mlperf.predict import __main__ as predict
from wan_mlperf.recipe import load_recipe
from wan_mlperf.report import __main__ as report
from wan_mlperf.vbench import __main__ as vbench
from wan_mlperf.video import write_mp4


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_names_of_any_length(model: Path) -> None:
    """255 bytes is what a name may have; ours beside it are short."""
    long = "x" * 246 + ".mp4"
    end = call(generate.main, "a red circle", "-o", long, "--model", str(model), "--set=mesh.ranks=1", *SMALL)
    assert end.code == 0, end.err
    assert os.listdir(".") == [long]
    for arguments in (["-o", "x" * 252 + ".mp4"], ["--recipe", "x" * 300], ["--model", "x" * 300], ["-o", "x" * 300 + "/a.mp4"]):
        refused(call(generate.main, "a red circle", *arguments), "File name too long")
    refused(call(run.main, "--outputs", "x" * 300), "File name too long")
    refused(call(report.main, "x" * 300), "File name too long")
    refused(call(vbench.main, "x" * 300), "File name too long")
    refused(call(predict.main, "--hardware=mi355x", "--json", "x" * 260), "File name too long")


@pytest.mark.parametrize("name", ["out[old]", "[/v2]", ":smile:", "[red]x[/red]", "{x}"])
def test_what_users_named_is_printed_as_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    file = tmp_path / "r" / f"{name.replace('/', '')}.yaml"
    file.write_text(f'name: "{name}"\nuser_conf: {load_recipe("tiny").user_conf_path}\n')
    end = call(run.main, "--recipe", str(file), "--explain")
    assert end.code == 0, end.err
    assert name in end.out


def test_a_summary_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    from sut import result as results
    from sut import run_record

    values = result("singlestream", "performance", recipe="[/v2] \x1b[31m")
    finished = TypeAdapter(results.Result).validate_json(json.dumps(values))
    run_record.print_summary(finished, Path("out[old]/run"))
    out = capsys.readouterr().out
    assert "out[old]/run" in out and "[/v2]" in out and "\x1b" not in out


def test_an_encoder_that_is_missing_is_noticed_first(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = av.codec.Codec

    def without(name: str, mode: str) -> Any:
        if name == "libx264":
            raise av.codec.codec.UnknownCodecError(name)
        return real(name, mode)

    monkeypatch.setattr(av.codec, "Codec", without)
    monkeypatch.setattr("wan_mlperf.pipeline.Pipeline.load", lambda *_: pytest.fail("weights were read"))
    refused(call(generate.main, "a red circle", "--model", str(model), "--set=mesh.ranks=1"), "libx264")
    refused(call(run.main, "--mode", "accuracy", "--model", str(model)), "libx264")


def test_names_that_are_not_utf8(tmp_path: Path, model: Path) -> None:
    odd = os.fsdecode(b"\xff\xfe")
    folder = tmp_path / f"run{odd}"
    folder.mkdir()
    write_mp4(folder / f"{odd}-0.mp4", [np.zeros((3, 32, 32, 3), np.uint8)], 8)
    for end in (call(vbench.main, str(folder), "--parse-only"), call(vbench.main, str(folder.parent), "--parse-only")):
        assert end.code in (1, 2) and "Traceback" not in end.err, end
    end = call(
        generate.main, "a red circle", "-o", str(tmp_path / f"{odd}.mp4"), "--model", str(model), "--set=mesh.ranks=1", *SMALL
    )
    assert end.code == 0 and (tmp_path / f"{odd}.mp4").is_file(), end.err
    refused(call(generate.main, f"a red {odd}"), "not valid UTF-8")
    refused(call(run.main, f"--set=workload.negative_prompt={odd}"), "not valid UTF-8")
    refused(call(run.main, "--outputs", odd), "not valid UTF-8")


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    from wan_mlperf.files import atomic_write

    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    atomic_write(tmp_path / "pipe", "page")
    assert os.read(reader, 10) == b"page"
    os.close(reader)
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    atomic_write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"


def test_a_name_in_configs_is_not_a_file_beside(tmp_path: Path) -> None:
    (tmp_path / "tiny").write_text("a file of the user's")
    assert load_recipe("tiny").name == "tiny"
    with pytest.raises(BadInput, match="holds str"):
        load_recipe("./tiny")
