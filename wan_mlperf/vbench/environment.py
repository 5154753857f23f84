"""VBench's separate environment: built once by `--setup`, then found and checked by every run.

VBench needs an older transformers than this project. Its environment contains everything that requirements.txt pins. It uses the
host's torch, which fits the GPU and saves a large download, or another one with `--torch`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wan_mlperf import process
from wan_mlperf.errors import BadInput, Failed
from wan_mlperf.files import atomic_write, cache_folder, scratch, writable_folder
from wan_mlperf.workload import DIMENSIONS

HERE = Path(__file__).resolve().parent
WORKER = HERE / "worker.py"
REQUIREMENTS = HERE / "requirements.txt"
MARK = "ready.json"  # written last: a folder without it is not an environment


@dataclass(frozen=True)
class Environment:
    """A folder with its own interpreter."""

    folder: Path

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        """The folder of the environment's packages."""
        return Path(sysconfig.get_path("purelib", "posix_prefix", vars={"base": str(self.folder)}))

    @property
    def full_info(self) -> Path:
        """VBench's list of prompts and dimensions."""
        return self.site_packages / "vbench" / "VBench_full_info.json"


def find() -> Environment:
    """Return the environment that `--setup` built. Raises BadInput without one, or if its requirements have changed."""
    environment = Environment(cache_folder() / "vbench")
    again = "allowed: build it with `python -m wan_mlperf.vbench --setup`"
    try:
        mark = json.loads((environment.folder / MARK).read_text())
    except (OSError, ValueError):
        raise BadInput(f"VBench's environment is not at {str(environment.folder)!r}; {again}") from None
    if mark["requirements"] != _requirements() or mark["python"] != sysconfig.get_python_version():
        raise BadInput(f"VBench's environment at {str(environment.folder)!r} is of an older version or another Python; {again}")
    return environment


def plan(torch_specs: Sequence[str]) -> list[str]:
    """Return the pinned requirements that `--setup` installs without their dependencies.

    A torchvision that belongs to the host's torch, or that `--torch` names, is used instead of the pinned one.
    """
    lines = [line.strip() for line in REQUIREMENTS.read_text().splitlines()]
    pins = [line for line in lines if line and not line.startswith("#")]
    own = any(spec.startswith("torchvision") for spec in torch_specs)
    host = not torch_specs and importlib.util.find_spec("torchvision") is not None
    return [pin for pin in pins if not (pin.startswith("torchvision==") and (own or host))]


def setup(torch_specs: Sequence[str] = ()) -> Environment:
    """Build the environment, import all six dimensions in it, and only then mark it as ready.

    `torch_specs`: requirements of another torch, installed with its dependencies. Without any, it uses the host's. Raises Failed.
    """
    folder = writable_folder(cache_folder(), what="cache folder") / "vbench"
    environment = Environment(folder)
    pins = plan(torch_specs)
    process.tell(f"building VBench's environment in {folder}")
    process.tell(f"  torch: {' '.join(torch_specs) or 'the one of this Python'}")
    process.tell(f"  installed there, without their dependencies: {', '.join(pins)}")
    shutil.rmtree(folder, ignore_errors=True)
    _call([sys.executable, "-m", "venv", "--without-pip", str(folder)], "making the environment")
    install = [sys.executable, "-m", "pip", "--python", str(environment.python), "install"]
    install += ["--disable-pip-version-check", "--quiet"]
    _call([*install, "--no-deps", *pins], "installing the pinned packages")
    if torch_specs:  # after the pins, which already include most of its dependencies
        _call([*install, *torch_specs], "installing torch")
    else:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            raise BadInput("this Python has no torch that VBench could use; allowed: --torch torch==VERSION")
        # Entries of a .pth file come after the environment's own packages, so the pins win and torch is found.
        (environment.site_packages / "host_torch.pth").write_text(f"{Path(spec.origin).parent.parent}\n")
    check = [str(environment.python), "-I", str(WORKER), "--check", *DIMENSIONS]
    versions = json.loads(_call(check, "importing VBench").splitlines()[-1])
    mark = {"requirements": _requirements(), "python": sysconfig.get_python_version(), "versions": versions}
    atomic_write(folder / MARK, json.dumps(mark, indent=1) + "\n")
    process.tell(f"ready: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    return environment


def _call(command: Sequence[str], doing: str) -> str:
    """Run a command and return its standard output. Raises Failed with the last line that it wrote."""
    try:
        with scratch("setup") as folder:  # a stopped pip leaves many files there
            variables = {**os.environ, "TMPDIR": str(folder)}
            done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Failed(f"{doing}: {command[0]}: {error.strerror}") from None
    if done.returncode:
        sys.stderr.write(done.stderr)
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
        raise Failed(f"{doing}: {last[0].strip()} (exit code {done.returncode})")
    return done.stdout


def _requirements() -> str:
    return hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
