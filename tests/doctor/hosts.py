"""Fake /proc and /sys trees."""

from pathlib import Path

from wan_mlperf.doctor.host_checks import Gpu

H100 = (Gpu("nvidia", "NVIDIA H100 80GB HBM3"), Gpu("nvidia", "NVIDIA H100 80GB HBM3"))
AMD = (Gpu("amd", "gfx950"),)
LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max open files            {nofile}               1048576              files
Max locked memory         {memlock}            unlimited            bytes
"""


def lay(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n")
    return root


def cpus(count: int, governor: str, c2_disabled: str) -> dict[str, str]:
    files = {}
    for index in range(count):
        cpu = f"sys/devices/system/cpu/cpu{index}"
        files[f"{cpu}/cpufreq/scaling_governor"] = governor
        for state, (name, latency, disabled) in enumerate([("C1", "1", "0"), ("C2", "100", c2_disabled)]):
            folder = f"{cpu}/cpuidle/state{state}"
            files |= {f"{folder}/name": name, f"{folder}/latency": latency, f"{folder}/disable": disabled}
    return files


def amd_node(index: int, gpus: int, links: int) -> dict[str, str]:
    """KFD node `index`, after two CPU nodes, with XGMI to `links` of the other GPUs and PCIe to CPU node 0."""
    node = f"sys/class/kfd/kfd/topology/nodes/{index + 2}"
    others = [other + 2 for other in range(gpus) if other != index][:links]
    files = {f"{node}/properties": "cpu_cores_count 0\nsimd_count 1024\ngfx_target_version 90500",
             f"{node}/mem_banks/0/properties": f"heap_type 1\nsize_in_bytes {288 * 2**30}",
             f"{node}/io_links/0/properties": f"type 2\nnode_from {index + 2}\nnode_to 0"}  # fmt: skip
    for number, other in enumerate(others, start=1):
        files[f"{node}/io_links/{number}/properties"] = f"type 11\nnode_from {index + 2}\nnode_to {other}"
    return files


def amd_host(root: Path, gpus: int = 8, links: int = 7) -> Path:
    files = {f"sys/class/kfd/kfd/topology/nodes/{cpu}/properties": "simd_count 0" for cpu in range(2)}
    files |= {"sys/module/amdgpu/version": "6.14.14", "dev/kfd": "", "dev/shm/x": "", **cpus(4, "performance", "1")}
    for index in range(gpus):
        device = f"sys/bus/pci/devices/0000:{index:02x}:00.0"
        files |= amd_node(index, gpus, links)
        files |= {f"dev/dri/renderD{128 + index}": "", f"{device}/vendor": "0x1002", f"{device}/device": "0x75a3"}
        files |= {f"{device}/ras/umc_err_count": "ue: 0\nce: 0"}
    files["sys/devices/system/edac/mc/mc0/dimm0/dimm_edac_mode"] = "S8ECD8ED"
    files |= {"proc/meminfo": f"MemTotal:       {3 * 2**30} kB", "proc/sys/kernel/numa_balancing": "0",
              "proc/sys/kernel/nmi_watchdog": "0", "proc/sys/kernel/randomize_va_space": "0",
              "sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never",
              "proc/self/limits": LIMITS.format(nofile=65536, memlock="unlimited")}  # fmt: skip
    return lay(root, files)


def no_smi(*arguments: str) -> None:
    raise AssertionError(f"nvidia-smi was asked: {arguments}")
