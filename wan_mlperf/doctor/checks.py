"""All checks of this host, in the order shown. Changes nothing, does not import torch; `host_checks.py` does the reading."""

import os
import re
from collections.abc import Mapping
from importlib import metadata
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

from wan_mlperf.doctor import ecc
from wan_mlperf.doctor import host_checks as host
from wan_mlperf.doctor.host_checks import Check, Gpu, Smi, Status, nvidia_smi

PACKAGES = {
    "torch": "torch",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "xfuser": "xfuser",
    "triton": "triton",
    "mlperf_loadgen": "mlcommons_loadgen",
}


def spec_of(module: str) -> ModuleSpec | None:
    """Find a module without importing it."""
    try:
        return find_spec(module)
    except ValueError:  # a module in sys.modules that was made by hand
        return None


def package(module: str, distribution: str) -> Check:
    """Check that a package is installed."""
    try:
        value = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        value = "version unknown" if spec_of(module) else "not installed"
    fix = f"pip install -c constraints.txt {distribution.replace('_', '-')}"
    return Check(module, value, "installed", "missing" if value == "not installed" else "ok", "importlib.metadata", fix)


def torch_builds() -> dict[str, str]:
    """Return the `cuda` and `hip` versions that torch was built for, from its version.py: importing torch takes seconds."""
    spec = spec_of("torch")
    text = host.read(Path(spec.origin).parent / "version.py") if spec and spec.origin else None
    return dict(re.findall(r"^(cuda|hip)\b[^=\n]*= '([^']+)'", text or "", re.M))


def torch_build(gpus: tuple[Gpu, ...], builds: Mapping[str, str]) -> Check:
    """Check that torch was built for these GPUs."""
    want = {"amd": "hip", "nvidia": "cuda"}[gpus[0].vendor] if gpus else "any"
    value = ", ".join(f"{name} {version}" for name, version in builds.items()) or "cpu"
    ok: Status = "ok" if want == "any" or want in builds else "missing"
    return Check("torch build", value, want, ok, "torch/version.py", "use the container of the GPU's vendor")


def aiter(gpus: tuple[Gpu, ...]) -> Check:
    """Check for AITER, which is not PyPI's `aiter`: only the right one has `ops`. Neither is imported."""
    spec = spec_of("aiter")
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    right = any((place / "ops").is_dir() or (place / "ops.py").is_file() for place in places)
    needed = bool(gpus) and gpus[0].vendor == "amd"
    value = "AITER" if right else "not AITER: aiter without aiter.ops is another package" if spec else "not installed"
    ok: Status = "ok" if right or not (spec or needed) else "missing" if needed else "warn"
    fix = ("pip uninstall aiter; " if spec and not right else "") + "AITER comes with the container rocm/pytorch-xdit"
    want = "AITER" if needed else "none without an AMD GPU"
    return Check("aiter", value, want, ok, "importlib.util.find_spec", fix)


def engine(gpus: tuple[Gpu, ...], device: str, problem: str | None) -> Check:
    """Check what a run would compute on: the device that one rank came up on (`kernels.ask`), or the problem that it met."""
    hidden = bool(gpus) and " on the CPU because " in device
    ok: Status = "missing" if problem else "warn" if hidden else "ok"
    fix = "let torch see the GPUs: the container of their vendor, and no *_VISIBLE_DEVICES that hides them"
    if problem:
        fix = "`make run` in a clone, or `make install` in the container of the GPU's vendor: docs/install.md"
    want = gpus[0].name if gpus else "any device"
    return Check("engine", f"does not come up: {problem}" if problem else device, want, ok, "xDiT on one rank", fix)


def examine(
    root: Path = Path("/"),
    env: Mapping[str, str] = os.environ,
    outputs: Path = Path("outputs"),
    *,
    quick: bool = False,
    smi: Smi = nvidia_smi,
) -> tuple[Check, ...]:
    """Run every check, in the order shown. `quick` leaves out those that need nvidia-smi."""
    gpus, builds = host.find_gpus(root), torch_builds()
    checks = [host.devices(root, gpus), host.driver(root, gpus, builds.get("cuda")), host.device_access(root, gpus)]
    if not (quick and gpus and gpus[0].vendor == "nvidia"):
        checks += [host.gpu_memory(gpus, smi), host.peer_links(gpus, smi), ecc.check(root, smi)]
    kernel, huge_pages = "proc/sys/kernel", "sys/kernel/mm/transparent_hugepage/enabled"
    memlock, nofile = (
        "ulimit -l unlimited; docker: --ulimit memlock=-1",
        "ulimit -n 65536; docker: --ulimit nofile=65536",
    )
    no_aslr = "sudo sysctl kernel.randomize_va_space=0  # for the run only: it is a protection"
    checks += [
        host.memory(root, gpus),
        host.disk("disk: outputs", outputs, 20, 1, "choose an output folder on a larger disk"),
        host.cache_disk(env, gpus),
        host.shared_memory(root, gpus),
        host.limit(root, "memlock", "Max locked memory", float("inf"), memlock),
        host.limit(root, "nofile", "Max open files", 65536, nofile),
        host.switch(root, "NUMA balancing", f"{kernel}/numa_balancing", "0", "sudo sysctl kernel.numa_balancing=0"),
        host.switch(root, "NMI watchdog", f"{kernel}/nmi_watchdog", "0", "sudo sysctl kernel.nmi_watchdog=0"),
        host.switch(root, "address randomisation", f"{kernel}/randomize_va_space", "0", no_aslr),
        host.switch(root, "transparent huge pages", huge_pages, "always", f"echo always | sudo tee /{huge_pages}"),
        host.governor(root),
        host.c_states(root),
        *(package(module, distribution) for module, distribution in PACKAGES.items()),
        torch_build(gpus, builds),
        aiter(gpus),
    ]
    return tuple(checks)


def summary(checks: tuple[Check, ...]) -> str:
    """Say in one line whether the host is ready, what is missing, and what could be tuned."""

    def named(status: Status) -> str:
        return ", ".join(f"{check.name} ({check.value})" for check in checks if check.ok == status) or "nothing"

    ready = all(check.ok != "missing" for check in checks)
    count = sum(check.ok == "ok" for check in checks)
    start = "host ready" if ready else f"host NOT ready, missing: {named('missing')}"
    return f"{start}; {count} of {len(checks)} as recommended; to tune: {named('warn')}"


def verdict(root: Path = Path("/"), env: Mapping[str, str] = os.environ, outputs: Path = Path("outputs")) -> str:
    """Return one line for the run record. It only reads files, so it takes milliseconds and touches no GPU."""
    return summary(examine(root, env, outputs, quick=True))
