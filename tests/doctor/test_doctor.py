"""The command: kernels and engine, JSON, exit code, one line for a run's record, and that nothing is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.doctor.hosts import H100, amd_host, cpus, lay, no_smi
from wan_mlperf.doctor import __main__ as command
from wan_mlperf.doctor import checks as doctor
from wan_mlperf.doctor import host_checks, kernels
from wan_mlperf.doctor.host_checks import Check
from wan_mlperf.kernels.backends import CANDIDATES, GEMM_CANDIDATES
from wan_mlperf.kernels.device import gpu_count
from wan_mlperf.kernels.features import Feature

LACKING = Feature(name="sage_fp4", runs="", numerics="", lacks=("AITER [x]: none",))
KERNELS = kernels.Answer(device="a device", recipe="tiny", kernels=(LACKING,))


def test_a_kernel_that_the_default_recipe_needs_and_does_not_have(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "examine", lambda **_: ())
    monkeypatch.setattr(command.kernels, "ask", lambda: kernels.Answer(recipe="tiny", kernels=(LACKING,), without=("sage_fp4",)))
    assert command.main([]) == 1
    shown = capsys.readouterr().out
    assert "AITER [x]: none" in shown and "kernels missing for recipe tiny: sage_fp4" in shown
    assert command.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["kernels"][0]["lacks"] == ["AITER [x]: none"]


def test_an_engine_that_nobody_can_ask_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as a host without torch, which the checks name themselves, too."""
    monkeypatch.setattr(command, "examine", lambda **_: ())
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert command.main([]) == 1
    assert "does not come up: " in capsys.readouterr().out


def test_an_engine_that_does_not_come_up_is_missing() -> None:
    cpu = "AMD EPYC, on the CPU because torch 2.13.0 is a CPU build"
    assert doctor.engine((), cpu, None).ok == "ok"
    assert doctor.engine(H100, "NVIDIA H100 80GB HBM3", None).ok == "ok"
    assert doctor.engine(H100, cpu, None).ok == "warn"
    lost = doctor.engine((), "", "ModuleNotFoundError: No module named 'triton'")
    assert lost.ok == "missing" and "No module named 'triton'" in lost.value


@pytest.mark.parametrize(("worst", "code"), [("ok", 0), ("warn", 0), ("missing", 1)])
def test_json_shape_and_exit_code(
    worst: host_checks.Status, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = (Check("a", "1", "1", "ok", "/a", ""), Check("b [/red]", "[x]", "2", worst, "/b", "set b"))
    monkeypatch.setattr(command, "examine", lambda **_: checks)
    monkeypatch.setattr(command.kernels, "ask", lambda: KERNELS)  # asking takes a process of its own: see below
    assert command.main(["--json"]) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is (code == 0) and answer["verdict"] == doctor.summary((*checks, doctor.engine((), "a device", None)))
    assert answer["checks"][1] == {"name": "b [/red]", "value": "[x]", "recommended": "2", "ok": worst, "source": "/b",
                                   "fix": "set b"}  # fmt: skip
    assert command.main([]) == code
    assert "[x]" in capsys.readouterr().out
    command.show(checks, Console(force_terminal=True, width=60))
    shown = capsys.readouterr().out
    assert "[x]" in shown and ("b [/red]: set b" in shown) is (worst != "ok")


def test_verdict_is_one_line_and_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is part of every run: files only, each read once, even on a large node."""
    root = lay(amd_host(tmp_path), cpus(192, "performance", "0"))
    seen: list[Path] = []

    def read(path: Path) -> str | None:
        seen.append(path)
        return real(path)

    real = host_checks.read
    monkeypatch.setattr(host_checks, "read", read)
    monkeypatch.setattr("subprocess.run", no_smi)
    line = doctor.verdict(root, {}, tmp_path)
    in_root = [path for path in seen if path.is_relative_to(root)]
    assert 192 * 4 < len(in_root) < 192 * 8
    assert "\n" not in line and "to tune: C-states (C2 enabled on 192 CPUs)" in line


@pytest.mark.job
def test_a_run_writes_nothing_and_imports_neither_torch_nor_aiter(tmp_path: Path) -> None:
    """In a separate process, an audit hook fails at the first write, in a folder without outputs/."""
    code = """
import sys
import wan_mlperf
known = set(sys.modules)
from wan_mlperf.doctor import __main__ as command
from wan_mlperf.doctor import checks as doctor
def hook(event, details):
    if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink"):
        raise SystemExit(f"{event} {details}")
    if event == "open" and details[0] != "/dev/null" and isinstance(details[2], int) and details[2] & 3:
        raise SystemExit(f"{event} {details}")
sys.addaudithook(hook)
code = command.main(["--json"])
doctor.verdict()
assert not {"torch", "aiter", "xfuser", "mlperf_loadgen"} & (set(sys.modules) - known)
sys.exit(code)
"""
    repository = Path(doctor.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(repository), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr
    answer = json.loads(done.stdout)
    assert done.returncode == (0 if answer["ok"] else 1)
    assert answer["problem"] is None and {one["name"] for one in answer["kernels"]} == {*CANDIDATES, *GEMM_CANDIDATES}
    if not gpu_count():
        runs = {one["name"]: (one["runs"], one["lacks"]) for one in answer["kernels"]}
        assert runs["sage_fp4"] == ("AITER_MXFP4 by reference (gfx950)", ["cpu has no kernel for it"])
        assert runs["sdpa"] == ("xDiT SDPA", [])
    assert not done.stderr and list(tmp_path.iterdir()) == []
