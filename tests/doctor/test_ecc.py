"""ECC as the doctor reads it, on fake /sys trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.doctor.hosts import amd_host, lay, no_smi
from wan_mlperf.doctor import ecc

DIMM = "sys/devices/system/edac/mc/mc0/{}/dimm_edac_mode"
INFORMATION = "proc/driver/nvidia/gpus/0000:{}:00.0/information"


def nvidia_host(root: Path) -> Path:
    return lay(root, {INFORMATION.format(bus): "Model: \t NVIDIA H100 80GB HBM3" for bus in ("1b", "43")})


def test_an_amd_node(tmp_path: Path) -> None:
    root = amd_host(tmp_path)
    assert ecc.state(root, no_smi) == ("on", "on 8 of 8 GPUs, DRAM on in 1 DIMMs")
    assert ecc.check(root, no_smi).ok == "ok"
    (root / "sys/bus/pci/devices/0000:03:00.0/ras/umc_err_count").unlink()
    assert ecc.state(root, no_smi) == ("unknown", "known to be on for 7 of 8 GPUs, DRAM on in 1 DIMMs")
    lay(root, {DIMM.format("dimm1"): "None"})
    assert ecc.state(root, no_smi)[0] == "off"
    assert ecc.check(root, no_smi).ok == "warn"


@pytest.mark.parametrize(
    ("said", "state", "text"),
    [
        ("Enabled\nEnabled\n", "on", "on 2 of 2 GPUs, DRAM on in 1 DIMMs"),
        ("Enabled\nDisabled\n", "off", "off on 1 of 2 GPUs, DRAM on in 1 DIMMs"),
        ("[N/A]\n[N/A]\n", "unknown", "known to be on for 0 of 2 GPUs, DRAM on in 1 DIMMs"),
        (None, "unknown", "known to be on for 0 of 2 GPUs, DRAM on in 1 DIMMs"),
    ],
)
def test_nvidia_gpus(tmp_path: Path, said: str | None, state: str, text: str) -> None:
    root = lay(nvidia_host(tmp_path), {DIMM.format("dimm0"): "SECDED"})
    assert ecc.state(root, lambda *_: said) == (state, text)


def test_a_machine_without_a_gpu(tmp_path: Path) -> None:
    assert ecc.state(tmp_path, no_smi) == ("unknown", "no GPU, DRAM not exposed here")
    lay(tmp_path, {DIMM.format("dimm0"): "SECDED", DIMM.format("dimm1"): "Unknown"})
    assert ecc.state(tmp_path, no_smi) == ("on", "no GPU, DRAM on in 1 DIMMs")
