"""What the host check reads: one small function per item, from /proc, /sys and the file system below `root`.

The recommended kernel, governor and C-state values are the usual ones for nodes that run latency benchmarks. Nothing here writes,
and only `nvidia_smi` starts a process.
"""

import math
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wan_mlperf.model_folder.parts import on_the_way

Status = Literal["ok", "warn", "missing"]
Smi = Callable[..., str | None]

GIB = 2**30
UNSEEN = "not exposed here: look on the host"
RANK_GIB = 6  # libraries, the GPU's context, pinned buffers: an estimate, no GPU was available
LARGEST_LAYER = 5120 * 13_824  # weights of an expert's feed-forward layer
CHECKPOINT_GIB = 130  # two experts of 14.3 B parameters in fp32, UMT5 in bf16, the VAE: about 126 GB
HUB_FOLDER = "models--Wan-AI--Wan2.2-T2V-A14B-Diffusers"
DEEP_US = 10  # exit latency above which an idle state delays a launch: C1 is 1 to 2 us, AMD's C2 100 and more
# Device ids by PCI vendor: MI300X to MI355X; Hopper, Blackwell. They tell a GPU without a driver from no GPU at all.
PCI_IDS = {"0x1002": ("0x74a", "0x75a"), "0x10de": ("0x23", "0x29", "0x31")}
NVIDIA_DRIVER = {"12": 525, "13": 580}  # oldest driver branch for torch's CUDA major version


@dataclass(frozen=True)
class Check:
    """One item that was read, its recommended value, and the command that would change it (never run here)."""

    name: str
    value: str
    recommended: str
    ok: Status
    source: str
    fix: str


@dataclass(frozen=True)
class Gpu:
    """One accelerator. `memory` (bytes) and `peers` (directly linked GPUs) stay 0 where sysfs does not say."""

    vendor: Literal["amd", "nvidia"]
    name: str
    memory: int = 0
    peers: int = 0


def read(path: Path) -> str | None:
    """Return a file's text, or None if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def properties(path: Path) -> dict[str, int]:
    """Return the numbers of a KFD properties file."""
    lines = (line.split() for line in (read(path) or "").splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdigit()}


def find_gpus(root: Path) -> tuple[Gpu, ...]:
    """Return the GPUs that this benchmark has kernels for: gfx942 and gfx950 from KFD, Hopper and Blackwell from /proc."""
    nodes = sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*"), key=lambda node: node.name.zfill(4))
    amd, found = {}, []
    for node in nodes:
        version = properties(node / "properties").get("gfx_target_version", 0)
        name = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
        if name in ("gfx942", "gfx950"):
            amd[node] = name
    ids = {int(node.name) for node in amd}
    for node, name in amd.items():
        banks = (properties(bank) for bank in node.glob("mem_banks/*/properties"))
        links = [properties(link) for link in node.glob("io_links/*/properties")]
        memory = sum(bank.get("size_in_bytes", 0) for bank in banks if bank.get("heap_type") in (1, 2))  # frame buffer
        peers = {link.get("node_to", -1) for link in links if link.get("type") == 11} & ids  # 11: XGMI
        found.append(Gpu("amd", name, memory, len(peers)))
    for folder in sorted((root / "proc/driver/nvidia/gpus").glob("*")):
        model = re.search(r"^Model:\s*(.+)$", read(folder / "information") or "", re.M)
        if model and re.search(r"\b(H|B|GH|GB)\d{2,3}\b", model[1]):
            found.append(Gpu("nvidia", model[1].strip()))
    return tuple(found)


def devices(root: Path, gpus: tuple[Gpu, ...]) -> Check:
    """Check which GPUs are visible, and that every GPU on the PCI bus is."""
    on_bus = 0
    for device in (root / "sys/bus/pci/devices").glob("*"):
        ids = PCI_IDS.get(read(device / "vendor") or "", ())
        on_bus += bool(ids) and (read(device / "device") or "").startswith(ids)
    value = ", ".join(f"{count} x {name}" for name, count in Counter(gpu.name for gpu in gpus).items())
    if len(gpus) < on_bus:
        value = f"{value or 'none visible'}; {on_bus} on the PCI bus"
    ok: Status = "missing" if on_bus and not gpus else "ok" if len(gpus) >= max(on_bus, 1) else "warn"
    value = value or "none: only the tiny workload runs here"
    source = "/sys/class/kfd, /proc/driver/nvidia, /sys/bus/pci"
    fix = "install the driver; docker: --device=/dev/kfd --device=/dev/dri, or --gpus all"
    return Check("devices", value, "8 x gfx950, or Hopper or Blackwell", ok, source, fix)


def driver(root: Path, gpus: tuple[Gpu, ...], cuda: str | None) -> Check:
    """Check that the GPUs' driver is loaded and new enough for torch's CUDA version."""
    if not gpus:
        return Check("driver", "none", "none without a GPU", "ok", "/sys/module", "")
    module = "amdgpu" if gpus[0].vendor == "amd" else "nvidia"
    source, version = f"/sys/module/{module}/version", read(root / f"sys/module/{module}/version")
    need = NVIDIA_DRIVER.get((cuda or "").split(".")[0], 525) if module == "nvidia" else 0
    want = f"nvidia {need} or newer" if need else "amdgpu of the ROCm release"
    if version is None:
        in_kernel = (root / "sys/module" / module).is_dir()
        value = f"{module} {'of the kernel' if in_kernel else 'not loaded'}"
        return Check("driver", value, want, "warn" if in_kernel else "missing", source, f"sudo modprobe {module}")
    branch = version.split(".")[0]
    ok: Status = "warn" if branch.isdigit() and int(branch) < need else "ok"
    return Check("driver", f"{module} {version}", want, ok, source, "install a newer driver")


def device_access(root: Path, gpus: tuple[Gpu, ...]) -> Check:
    """Check that this user may open the GPUs' device files."""
    if not gpus:
        return Check("device access", "none", "none without a GPU", "ok", "/dev", "")
    if gpus[0].vendor == "amd":
        files, fix = [root / "dev/kfd", *(root / "dev/dri").glob("renderD*")], "sudo usermod -aG render,video $USER"
    else:
        files, fix = [root / "dev/nvidiactl", *(root / "dev").glob("nvidia[0-9]*")], "docker run --gpus all"
    closed = [file.name for file in files if not os.access(file, os.R_OK | os.W_OK)]
    if len(files) == 1:
        closed.append("no GPU device file")
    value = f"closed: {', '.join(closed)}" if closed else f"{len(files)} files"
    return Check("device access", value, "read and write", "missing" if closed else "ok", "/dev", fix)


def nvidia_smi(*arguments: str) -> str | None:
    """Return nvidia-smi's output, or None if it fails."""
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def gpu_memory(gpus: tuple[Gpu, ...], smi: Smi = nvidia_smi) -> Check:
    """Check that every GPU has enough memory."""
    sizes = [gpu.memory / GIB for gpu in gpus]
    if gpus and gpus[0].vendor == "nvidia":
        text = smi("--query-gpu=memory.total", "--format=csv,noheader,nounits") or ""
        sizes = [int(line) / 1024 for line in text.split() if line.isdigit()]
    least = min(sizes, default=0.0)
    value = f"{least:.0f} GiB each" if least else "not readable" if gpus else "no GPU"
    ok: Status = "ok" if least >= 76 or not gpus else "warn"  # a card sold as 80 GB reports 79 GiB
    source, fix = "KFD mem_banks, nvidia-smi", "a recipe that splits the model over more GPUs"
    return Check("GPU memory", value, "80 GB or more", ok, source, fix)


def peer_links(gpus: tuple[Gpu, ...], smi: Smi = nvidia_smi) -> Check:
    """Check that every pair of GPUs has XGMI or NVLink: Ulysses' all-to-all uses each pair."""
    count, want, source = len(gpus), "a direct link between every pair", "KFD io_links, nvidia-smi topo -m"
    if count < 2:
        return Check("GPU peer links", f"{count} GPU", want, "ok", source, "")
    if gpus[0].vendor == "amd":
        linked, kind = sum(gpu.peers for gpu in gpus) // 2, "XGMI"
    else:
        rows = [line.split()[1:] for line in (smi("topo", "-m") or "").splitlines() if re.match(r"GPU\d", line)]
        linked, kind = sum(cell.startswith("NV") for row in rows for cell in row) // 2, "NVLink"
    pairs = count * (count - 1) // 2
    fix = "amd-smi topology, or nvidia-smi nvlink --status, names the link that is down"
    ok: Status = "ok" if linked >= pairs else "warn"
    return Check("GPU peer links", f"{linked} of {pairs} pairs by {kind}", want, ok, source, fix)


def rank_gib(threads: int) -> float:
    """GiB of host memory per rank with a GPU, besides the checkpoint, which should stay in the page cache while ranks read it."""
    return RANK_GIB + on_the_way(LARGEST_LAYER, max(1, threads)) / GIB


def memory(root: Path, gpus: tuple[Gpu, ...]) -> Check:
    """Check the host's memory, or its container's limit."""
    text = re.search(r"^MemTotal:\s+(\d+) kB", read(root / "proc/meminfo") or "", re.M)
    total, limit = int(text[1]) * 1024 if text else 0, read(root / "sys/fs/cgroup/memory.max") or ""
    total = min(total, int(limit)) if limit.isdigit() else total
    want = math.ceil(CHECKPOINT_GIB + len(gpus) * rank_gib(len(os.sched_getaffinity(0)) // len(gpus))) if gpus else 4
    value = f"{total / GIB:.0f} GiB" if total else "not readable"
    ok: Status = "ok" if total >= want * GIB else "warn"
    source, fix = "/proc/meminfo, cgroup memory.max", "raise the memory limit of the container or the job"
    return Check("memory", value, f"{want} GiB or more", ok, source, fix)


def disk(name: str, folder: Path, want_gib: int, need_gib: int, fix: str) -> Check:
    """Check the free space where `folder` is, or will be. With `need_gib` 0 the run does not need it: at most a warning."""
    there = folder.absolute()
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    try:
        free, writable = shutil.disk_usage(there).free / GIB, os.access(there, os.W_OK)
        value = f"{free:.1f} GiB free" + ("" if writable else ", not writable")
    except OSError as error:
        free, writable, value = 0.0, False, f"not readable ({error.strerror})"
    short: Status = "missing" if need_gib and (free < need_gib or not writable) else "warn"
    ok: Status = "ok" if free >= want_gib and writable else short
    return Check(name, value, f"{want_gib} GiB or more", ok, str(folder), fix)


def shared_memory(root: Path, gpus: tuple[Gpu, ...]) -> Check:
    """Check the size of /dev/shm."""
    want, need = (8, 1) if gpus else (1, 0)  # docker's default of 64 MiB stops RCCL and NCCL
    folder, fix = root / "dev/shm", "docker run --shm-size=16g, or --ipc=host"
    if not os.path.isdir(folder):
        return Check("/dev/shm", "absent", f"{want} GiB or more", "missing" if need else "warn", str(folder), fix)
    return disk("/dev/shm", folder, want, need, fix)


def hub_cache(env: Mapping[str, str]) -> Path:
    """Return the folder of the Hugging Face cache."""
    home = env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME", "~"), ".cache"), "huggingface")
    return Path(env.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def cache_disk(env: Mapping[str, str], gpus: tuple[Gpu, ...]) -> Check:
    """Check that the checkpoint is in the cache, or fits on its disk."""
    cache = hub_cache(env)
    have = os.path.isdir(cache / HUB_FOLDER / "snapshots")
    # At most a warning: the recipe may name a folder elsewhere, and a filled cache may be read-only.
    return disk("disk: cache", cache, CHECKPOINT_GIB if gpus and not have else 1, 0, "export HF_HOME=<a larger disk>")


def limit(root: Path, name: str, row: str, want: float, fix: str) -> Check:
    """Check one of this process's resource limits."""
    text = re.search(rf"^{row}\s+(\S+)", read(root / "proc/self/limits") or "", re.M)
    value = text[1] if text else "not readable"
    amount = float("inf") if value == "unlimited" else float(value) if value.isdigit() else -1.0
    shown = "unlimited" if want == float("inf") else f"{want:.0f} or more"
    return Check(name, value, shown, "ok" if amount >= want else "warn", "/proc/self/limits", fix)


def switch(root: Path, name: str, path: str, want: str, fix: str) -> Check:
    """Check one kernel setting. Of a choice such as `always [madvise] never`, the one in brackets counts."""
    text = read(root / path)
    chosen = re.search(r"\[(\w+)\]", text or "")
    value = chosen[1] if chosen else text or UNSEEN
    return Check(name, value, want, "ok" if value == want else "warn", f"/{path}", fix)


def governor(root: Path) -> Check:
    """Check the frequency governor of every CPU."""
    files = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    found = Counter(text for text in (read(file) for file in files) if text)
    value = ", ".join(f"{name} on {count} CPUs" for name, count in sorted(found.items()))
    ok: Status = "ok" if set(found) == {"performance"} else "warn"
    source, fix = "/sys/devices/system/cpu/cpu*/cpufreq", "sudo cpupower frequency-set -g performance"
    return Check("CPU governor", value or UNSEEN, "performance", ok, source, fix)


def c_states(root: Path) -> Check:
    """Check that no slow idle state is enabled."""
    deep: Counter[str] = Counter()
    states = list((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpuidle/state*"))
    for state in states:
        latency = read(state / "latency") or ""
        if latency.isdigit() and int(latency) > DEEP_US and read(state / "disable") != "1":
            deep[read(state / "name") or state.name] += 1
    value = ", ".join(f"{name} enabled on {count} CPUs" for name, count in sorted(deep.items()))
    ok: Status = "ok" if states and not deep else "warn"
    source, fix = "/sys/devices/system/cpu/cpu*/cpuidle", f"sudo cpupower idle-set -D {DEEP_US + 1}"
    value = value or ("none deep" if states else UNSEEN)
    return Check("C-states", value, f"none slower than {DEEP_US} us", ok, source, fix)
