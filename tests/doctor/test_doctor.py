"""The host check on fake /proc and /sys trees: good, bad and absent values, exit code, and that nothing is written."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from wan_mlperf.doctor import __main__ as command
from wan_mlperf.doctor import checks as doctor
from wan_mlperf.doctor import host_checks, kernels
from wan_mlperf.doctor.host_checks import Check, Gpu
from wan_mlperf.kernels.backends import CANDIDATES, GEMM_CANDIDATES
from wan_mlperf.kernels.device import gpu_count
from wan_mlperf.kernels.features import Feature

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


def by_name(checks: tuple[Check, ...]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def no_smi(*arguments: str) -> None:
    raise AssertionError(f"nvidia-smi was asked: {arguments}")


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 500 * 2**30})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)


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
        assert runs["sage_fp4"] == ("AITER_MXFP4 by reference (gfx950)", ["cpu has no kernel of it"])
        assert runs["sdpa"] == ("xDiT SDPA", [])
    assert not done.stderr and list(tmp_path.iterdir()) == []
