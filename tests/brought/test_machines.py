"""Machines as people have them: variables left over, no locks, too little memory, other locales, older Pythons."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.brought.command import SMALL
from tests.brought.command import run as call
from tests.brought.test_arguments import refused
from tests.conftest import ROOT, run_module
from wan_mlperf import process, ranks, run
from wan_mlperf.errors import BadInput
from wan_mlperf.generate import __main__ as generate
from wan_mlperf.inputs import locks


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "1"}, ["RANK=1 is set in the environment", "unset RANK"]),
        ({"RANK": "0"}, ["RANK=0 is set in the environment", "WORLD_SIZE"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2"]),
        ({"LOCAL_RANK": "0"}, ["LOCAL_RANK=0", "unset LOCAL_RANK"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}, ["MASTER_PORT not"]),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, ["RANK=2 with WORLD_SIZE=2"]),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, ["RANK='x'", "not a number"]),
        ({"RANK": "-1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, ["RANK='-1'"]),
    ],
)
def test_variables_left_over_are_named(variables: dict[str, str], words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused(call(generate.main, "a red circle", "--explain"), *words, "torchrun")


def test_an_address_alone_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters often set it for every shell."""
    monkeypatch.setenv("MASTER_ADDR", "head-node")
    monkeypatch.setenv("RANK", "")
    assert ranks.problem() is None and not ranks.under_torchrun()


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(BadInput, match=rf"has no locks \({os.strerror(error)}\); allowed: another folder, or --no-lock"):
        locks.lock(tmp_path, what="--output")
    said: list[str] = []
    assert locks.lock(tmp_path, what="--output", without=said.append) is None
    assert len(said) == 1 and "going on without one" in said[0]


def test_a_lock_that_is_held_is_another_runs(tmp_path: Path) -> None:
    held = locks.lock(tmp_path, what="--output")
    with pytest.raises(BadInput, match="another run writes there"):
        locks.lock(tmp_path, what="--output")
    locks.unlock(tmp_path, held)
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_one_line() -> None:
    """What torch, numpy and Python say when there is none left."""
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        line = process.why(error)
    assert line is not None and line.startswith("out of memory: asked for 1073741824.00 GiB; ") and "\n" not in line
    gpu = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.02 GiB is free."
    line = process.why(torch.OutOfMemoryError(gpu))
    assert line is not None and "asked for 2.00 GiB; GPU 0 has a total capacity of 79.10 GiB of which 1.02 GiB is free" in line
    assert (process.why(MemoryError()) or "").startswith("out of memory: ")
    assert process.why(RuntimeError("shapes do not fit")) is None


def test_a_read_that_fails_names_its_file() -> None:
    """The system says which file for `open` only. Nothing is mapped at address 0 of this process's memory."""
    file = Path("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output") as caught:
        file.read_bytes()
    assert caught.value.filename is None
    assert process.why(caught.value) == "/proc/self/mem: Input/output error"
    with pytest.raises(OSError, match="Input/output") as caught, open("/proc/self/mem", "rb") as stream:
        stream.read(1)
    assert process.why(caught.value) == "/proc/self/mem: Input/output error"


def test_a_librarys_words_do_not_hide_the_reason() -> None:
    with pytest.raises(OSError, match="Unable to load") as caught:
        try:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/m/vae.safetensors")
        except OSError:
            raise OSError("Unable to load weights from /m/vae.safetensors") from None
    assert (process.why(caught.value) or "").endswith("Unable to load weights from /m/vae.safetensors (Too many open files)")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_audit_needs_the_prompt_that_it_repeats(count: int, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a red circle\n" * count)
    refused(
        call(run.main, "--test04", "--prompts", "list.txt"), f"--test04 with {count} prompts", "allowed: a list of at least 4"
    )


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_latest_is_the_users_own(kind: str, model: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    (outputs / "latest").mkdir() if kind == "folder" else (outputs / "latest").touch()
    refused(call(run.main, "--model", str(model)), f"'latest' is a {kind} of yours")
    assert [one.name for one in outputs.iterdir()] == ["latest"]


def test_explain_shows_the_models_own_scheduler(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy", copy_function=os.symlink)
    file = copy / "scheduler" / "scheduler_config.json"
    values = json.loads(file.read_text())
    file.unlink()
    file.write_text(json.dumps({**values, "flow_shift": 7.0}))

    def explained(folder: Path) -> Any:
        end = call(generate.main, "a", "--model", str(folder), "--explain", "--json")
        assert end.code == 0, end
        return json.loads(end.out)

    theirs, ours = explained(copy), explained(model)
    assert (theirs["scheduler"]["flow_shift"], theirs["scheduler"]["from"]) == (7.0, str(copy))
    assert theirs["plan"][1]["sigma"] > ours["plan"][1]["sigma"]


def test_the_supported_pythons_agree() -> None:
    """What pyproject.toml asks for is what the pins have wheels for, and what the Makefile says."""
    declared = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    named = re.search(r"with Python (3\.\d+)", (ROOT / "Makefile").read_text())
    assert declared is not None and named is not None and named[1] == f"3.{declared[1]}"
    assert sys.version_info >= (3, int(declared[1]))


@pytest.mark.job
def test_a_name_in_any_script_under_the_c_locale(model: Path, tmp_path: Path) -> None:
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "wan_mlperf.generate",
        "a red circle",
        "-o",
        "圆.mp4",
        f"--model={model}",
        "--set=mesh.ranks=1",
    ]
    done = subprocess.run([*command, *SMALL], cwd=tmp_path, env=env, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [one.name for one in tmp_path.iterdir()] == ["圆.mp4"]


@pytest.mark.slow
def test_bad_input_on_one_rank_only(model: Path, tmp_path: Path) -> None:
    """A file that is missing on one host: that rank's line, once, and all ranks end."""
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1':\n    os.environ['HOME'] = os.environ['OTHER_HOME']\n"
    )
    for number in (0, 1):
        (tmp_path / f"home{number}").mkdir()
    (tmp_path / "home0" / "list.txt").write_text("a red circle\n")
    env = {"PYTHONPATH": str(tmp_path / "hooks"), "HOME": str(tmp_path / "home0"), "OTHER_HOME": str(tmp_path / "home1")}
    words = ["wan_mlperf.generate", "--prompts", "~/list.txt", f"--model={model}", "-o", str(tmp_path / "out")]
    done = run_module(words, ranks=2, env=env)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "rank 1 on " in line and "list.txt" in line and "No such file" in line
    assert f"{ROOT}/wan_mlperf" not in done.stderr  # a traceback is torchrun's own
