"""Is ECC on in the memory of the GPUs and the host? MLPerf's rules require it for every performance and accuracy run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from wan_mlperf.doctor.host_checks import PCI_IDS, Check, Gpu, Smi, find_gpus, nvidia_smi, read

State = Literal["on", "off", "unknown", "none"]


def gpu_memory(root: Path, gpus: tuple[Gpu, ...], smi: Smi) -> tuple[State, str]:
    """The GPUs' memory: the mode that nvidia-smi shows, or whether amdgpu counts the errors of every memory controller."""
    if not gpus:
        return "none", "no GPU"
    if gpus[0].vendor == "nvidia":
        modes = re.findall(r"^(Enabled|Disabled)$", smi("--query-gpu=ecc.mode.current", "--format=csv,noheader") or "", re.M)
        if "Disabled" in modes:
            return "off", f"off on {modes.count('Disabled')} of {len(gpus)} GPUs"
        counted = len(modes)
    else:
        devices = [folder for folder in (root / "sys/bus/pci/devices").glob("*") if read(folder / "vendor") == "0x1002"]
        ours = [folder for folder in devices if (read(folder / "device") or "").startswith(PCI_IDS["0x1002"])]
        counted = sum((folder / "ras/umc_err_count").is_file() for folder in ours)
    if counted >= len(gpus):
        return "on", f"on {counted} of {len(gpus)} GPUs"
    return "unknown", f"known to be on for {counted} of {len(gpus)} GPUs"


def host_memory(root: Path) -> tuple[State, str]:
    """The host's memory, from the kernel's EDAC, which lists a controller if its driver is loaded."""
    controllers = sorted((root / "sys/devices/system/edac/mc").glob("mc[0-9]*"))
    modes = [read(file) for folder in controllers for file in folder.glob("*/dimm_edac_mode")]
    known = [mode for mode in modes if mode and mode != "Unknown"]
    if not controllers or not known:
        return "unknown", "DRAM not exposed here"
    if "None" in known:
        return "off", f"off in {known.count('None')} of {len(known)} DIMMs"
    return "on", f"DRAM on in {len(known)} DIMMs"


def state(root: Path = Path("/"), smi: Smi = nvidia_smi) -> tuple[State, str]:
    """Return "on" only if all memory has ECC on, "off" if any has it off; and what was read of each."""
    parts = (gpu_memory(root, find_gpus(root), smi), host_memory(root))
    states = [one for one, _ in parts if one != "none"]
    whole: State = "off" if "off" in states else "unknown" if "unknown" in states else "on"
    return whole, ", ".join(text for _, text in parts)


def check(root: Path, smi: Smi) -> Check:
    """The doctor's line about ECC. Never `missing`: a run works without ECC, but its result cannot be submitted."""
    whole, text = state(root, smi)
    fix = "nvidia-smi -e 1, then a reboot; DRAM: the firmware's setup; not exposed: look on the host (edac-util, amd-smi)"
    source = "nvidia-smi, amdgpu's ras/, /sys/devices/system/edac"
    return Check("ECC", f"{whole}: {text}", "on", "ok" if whole == "on" else "warn", source, fix)
