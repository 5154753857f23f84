"""The host check on fake /proc and /sys trees: good, bad and absent values."""

import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.doctor.hosts import AMD, H100, LIMITS, amd_host, cpus, lay, no_smi
from wan_mlperf.doctor import checks as doctor
from wan_mlperf.doctor import host_checks
from wan_mlperf.doctor.host_checks import Check


def by_name(checks: tuple[Check, ...]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_a_well_set_amd_node_is_as_recommended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site/aiter/ops").mkdir(parents=True)
    (tmp_path / "site/aiter/__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(doctor, "torch_builds", lambda: {"hip": "7.1"})
    checks = doctor.examine(amd_host(tmp_path / "root"), {"HOME": "/nowhere"}, tmp_path, smi=no_smi)
    host = [check for check in checks if check.name not in doctor.PACKAGES]
    assert [check for check in host if check.ok != "ok"] == []
    named = by_name(checks)
    assert named["devices"].value == "8 x gfx950"
    assert named["driver"].value == "amdgpu 6.14.14"
    assert named["GPU memory"].value == "288 GiB each"
    assert named["GPU peer links"].value == "28 of 28 pairs by XGMI"
    assert named["aiter"].value == "AITER"


def test_values_that_cost_speed_are_warnings_with_their_command(tmp_path: Path) -> None:
    root = amd_host(tmp_path, links=6)
    lay(root, {"proc/sys/kernel/numa_balancing": "1", "proc/sys/kernel/nmi_watchdog": "1",
               "proc/sys/kernel/randomize_va_space": "2", "proc/meminfo": "MemTotal: 1000 kB",
               "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never", **cpus(4, "powersave", "0"),
               "proc/self/limits": LIMITS.format(nofile=1024, memlock=8388608)})  # fmt: skip
    named = by_name(doctor.examine(root, {}, tmp_path))
    expected = {
        "NUMA balancing": ("1", "sysctl kernel.numa_balancing=0"),
        "NMI watchdog": ("1", "sysctl kernel.nmi_watchdog=0"),
        "address randomisation": ("2", "sysctl kernel.randomize_va_space=0"),
        "transparent huge pages": ("madvise", "echo always | sudo tee"),
        "CPU governor": ("powersave on 4 CPUs", "cpupower frequency-set -g performance"),
        "C-states": ("C2 enabled on 4 CPUs", "cpupower idle-set -D 11"),
        "memlock": ("8388608", "ulimit -l unlimited"),
        "nofile": ("1024", "ulimit -n 65536"),
        "memory": ("0 GiB", "memory limit"),
        "GPU peer links": ("24 of 28 pairs by XGMI", "amd-smi topology"),
    }
    for name, (value, fix) in expected.items():
        assert (named[name].value, named[name].ok) == (value, "warn")
        assert fix in named[name].fix


def test_an_empty_root_warns_and_raises_nothing(tmp_path: Path) -> None:
    named = by_name(doctor.examine(tmp_path, {}, tmp_path / "not/yet/there", smi=no_smi))
    unseen = (
        "NUMA balancing",
        "NMI watchdog",
        "address randomisation",
        "transparent huge pages",
        "CPU governor",
        "C-states",
    )
    assert {named[name].value for name in unseen} == {host_checks.UNSEEN}
    assert {named[name].value for name in ("memory", "memlock", "nofile")} == {"not readable"}
    assert (named["devices"].ok, named["/dev/shm"].value, named["disk: outputs"].ok) == ("warn", "absent", "ok")
    assert {check.ok for check in named.values() if check.name not in doctor.PACKAGES} == {"ok", "warn"}


def test_a_gpu_without_its_driver_is_missing_and_a_dead_one_is_a_warning(tmp_path: Path) -> None:
    bus = {"sys/bus/pci/devices/0/vendor": "0x10de", "sys/bus/pci/devices/0/device": "0x2330",
           "sys/bus/pci/devices/1/vendor": "0x10de", "sys/bus/pci/devices/1/device": "0x1f99"}  # fmt: skip
    check = host_checks.devices(lay(tmp_path / "none", bus), ())
    assert (check.ok, check.value) == ("missing", "none visible; 1 on the PCI bus")
    root = amd_host(tmp_path / "dead")
    check = host_checks.devices(root, host_checks.find_gpus(root)[:7])
    assert (check.ok, check.value) == ("warn", "7 x gfx950; 8 on the PCI bus")


def test_nvidia_devices_driver_memory_and_links(tmp_path: Path) -> None:
    text = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 1"
    root = lay(tmp_path, {f"proc/driver/nvidia/gpus/0000:{bus}:00.0/information": text for bus in ("1b", "43")})
    lay(root, {"proc/driver/nvidia/gpus/0000:99:00.0/information": "Model: NVIDIA GeForce RTX 4090"})
    gpus = host_checks.find_gpus(root)
    assert gpus == H100
    assert host_checks.driver(root, gpus, "13.0").ok == "missing"
    lay(root, {"sys/module/nvidia/version": "570.86.15"})
    assert (host_checks.driver(root, gpus, "12.8").ok, host_checks.driver(root, gpus, "13.0").ok) == ("ok", "warn")
    assert host_checks.device_access(root, gpus).ok == "missing"
    lay(root, {"dev/nvidiactl": "", "dev/nvidia0": "", "dev/nvidia1": ""})
    assert host_checks.device_access(root, gpus).ok == "ok"
    assert host_checks.gpu_memory(gpus, lambda *_: "81559\n81559\n").value == "80 GiB each"
    assert host_checks.gpu_memory(gpus, lambda *_: None).ok == "warn"
    header = "\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\x1b[0m\n"
    topology = header + "GPU0\t X \t{0}\tSYS\t0-47\nGPU1\t{0}\t X \tPIX\t0-47\nNIC0\tSYS\tPIX\t X \n"
    assert host_checks.peer_links(gpus, lambda *_: topology.format("NV18")).value == "1 of 1 pairs by NVLink"
    assert host_checks.peer_links(gpus, lambda *_: topology.format("PHB")).ok == "warn"
    names = {check.name for check in doctor.examine(root, {}, tmp_path, quick=True, smi=no_smi)}
    assert "driver" in names and not {"GPU memory", "GPU peer links", "ECC"} & names


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"
    assert host_checks.hub_cache({"HF_HUB_CACHE": str(hub), "HF_HOME": "/other"}) == hub
    assert host_checks.hub_cache({"HF_HOME": str(tmp_path)}) == hub
    assert host_checks.hub_cache({"HOME": "/h"}) == Path("/h/.cache/huggingface/hub")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2 * 2**30}))
    assert host_checks.cache_disk({"HF_HUB_CACHE": str(hub)}, H100).ok == "warn"
    (hub / host_checks.HUB_FOLDER / "snapshots").mkdir(parents=True)
    assert host_checks.cache_disk({"HF_HUB_CACHE": str(hub)}, H100).ok == "ok"
    assert [host_checks.disk("d", tmp_path, want, need, "").ok for want, need in ((1, 1), (20, 1), (20, 4))] == [
        "ok", "warn", "missing"]  # fmt: skip
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert host_checks.disk("d", tmp_path, 1, 1, "").ok == "missing"
    assert host_checks.disk("d", tmp_path, 1, 0, "").ok == "warn"


def test_a_container_limit_counts_as_the_memory(tmp_path: Path) -> None:
    root = lay(tmp_path, {"proc/meminfo": f"MemTotal: {3 * 2**30} kB", "sys/fs/cgroup/memory.max": str(64 * 2**30)})
    assert host_checks.memory(root, AMD).value == "64 GiB"


def test_the_memory_that_loading_takes_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint in the page cache, and per rank what does not depend on an expert's size: 17 layers at most."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(256)))
    check = host_checks.memory(lay(tmp_path, {"proc/meminfo": f"MemTotal: {200 * 2**20} kB"}), AMD[:1] * 8)
    assert check.recommended == "198 GiB or more" and check.ok == "ok"
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert host_checks.memory(tmp_path, AMD[:1] * 8).recommended == "181 GiB or more"


def test_the_wrong_aiter_is_told_from_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda module: None)
    assert (doctor.aiter(()).ok, doctor.aiter(H100).ok, doctor.aiter(AMD).ok) == ("ok", "ok", "missing")
    monkeypatch.undo()
    (tmp_path / "aiter").mkdir()
    (tmp_path / "aiter/__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert (doctor.aiter(()).ok, doctor.aiter(AMD).ok) == ("warn", "missing")
    assert "pip uninstall aiter" in doctor.aiter(AMD).fix and "aiter.ops" in doctor.aiter(AMD).value
    assert "aiter" not in sys.modules


def test_packages_and_torch_build() -> None:
    assert doctor.package("no_such_module", "no-such-distribution").ok == "missing"
    assert doctor.package("rich", "rich").value == metadata.version("rich")
    assert doctor.torch_build(AMD, {"cuda": "13.0"}).ok == "missing"
    assert doctor.torch_build(AMD, {"hip": "7.1"}).ok == "ok"
    assert doctor.torch_build((), {}).value == "cpu"
