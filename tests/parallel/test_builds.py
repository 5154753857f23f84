"""A build of torch for GPUs on a machine without one: the engine runs on the CPU, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import run_module
from wan_mlperf.kernels import device

HOOKS = Path(__file__).with_name("hooks")
SIZES = ("--steps", "2", "--size", "32x32", "--frames", "5")


@pytest.mark.job
@pytest.mark.parametrize(
    ("build", "name"), [("cuda=13.0", "CUDA 13.0"), pytest.param("hip=7.1", "ROCm 7.1", marks=pytest.mark.slow)]
)
def test_the_engine_runs(build: str, name: str, model: Path, tmp_path: Path) -> None:
    """Two ranks, of one replica with Ulysses, and everything else as a user starts it."""
    env = {"PYTHONPATH": str(HOOKS), "WAN_MLPERF_TEST_BUILD": build, "CUDA_VISIBLE_DEVICES": ""}
    words = ["a red circle", "-o", str(tmp_path / "x.mp4"), "--model", str(model), *SIZES, "--set", "mesh.cfg=1"]
    done = run_module(["wan_mlperf.generate", *words], env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "x.mp4").stat().st_size
    version = torch.__version__.split("+")[0]
    because = f"on the CPU because torch {version}, built for {name}, finds no GPU with CUDA_VISIBLE_DEVICES=''"
    assert f"tiny: 1 replica x CFG 1 x Ulysses 2, {device.probe().name}, {because}" in done.stderr


@pytest.mark.parametrize(
    ("builds", "variables", "because"),
    [
        ({"cuda": None, "hip": None}, {}, "is a CPU build"),
        ({"cuda": "13.0", "hip": None}, {}, ", built for CUDA 13.0, finds no GPU"),
        (
            {"cuda": "13.0", "hip": None},
            {"CUDA_VISIBLE_DEVICES": "7"},
            ", built for CUDA 13.0, finds no GPU with CUDA_VISIBLE_DEVICES='7'",
        ),
        (
            {"cuda": None, "hip": "7.1"},
            {"ROCR_VISIBLE_DEVICES": ""},
            ", built for ROCm 7.1, finds no GPU with ROCR_VISIBLE_DEVICES=''",
        ),
    ],
)
def test_why_there_is_no_gpu(
    builds: dict[str, str | None], variables: dict[str, str], because: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in device.VISIBLE["ROCm"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name, version in builds.items():
        monkeypatch.setattr(torch.version, name, version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    look_again(monkeypatch)
    assert (device.gpu_count(), device.probe().arch, device.probe().is_gpu) == (0, "cpu", False)
    separator = "" if because.startswith(",") else " "
    assert device.probe().why_cpu == f"torch {torch.__version__.split('+')[0]}{separator}{because}"


def test_what_torch_says_of_a_driver_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_available() -> bool:
        import warnings

        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).\nPlease update", stacklevel=1
        )
        return False

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    look_again(monkeypatch)
    assert "says: CUDA initialization: The NVIDIA driver on your system is too old (found version 11040)" in str(device.probe())
    assert "\n" not in str(device.probe()) and "Please" not in str(device.probe())


def look_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probe anew, for this test only."""
    monkeypatch.setattr(device, "_look", device._look.__wrapped__)
    monkeypatch.setattr(device, "probe", device.probe.__wrapped__)
