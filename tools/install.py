"""Install this project into the Python that runs this file, for a container with its own torch (ROCm, CUDA): `make install`.

The container's torch, triton and GPU libraries stay as they are: pip gets their versions as constraints. Arguments go to pip:
--dry-run, --user. Standard library only.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("torch", "triton", "pytorch", "nvidia", "rocm")  # name prefixes of what a container built for its GPUs
VBENCH = "vbench==0.1.5"  # for its list of prompts only: its own pins would replace transformers and numpy


def pins(distributions: Iterable[importlib.metadata.Distribution]) -> list[str]:
    """Return `name==version` of each installed package that must stay, sorted."""
    found = {(one.metadata["Name"] or "", one.version) for one in distributions}
    return sorted(f"{name}=={version}" for name, version in found if name.lower().startswith(KEPT))


def main(arguments: Sequence[str]) -> int:
    """Install; `arguments` go to pip. Returns pip's exit code."""
    kept = pins(importlib.metadata.distributions())
    print("kept as installed:", ", ".join(kept) or "nothing, as there is no torch here", flush=True)
    pip = [sys.executable, "-m", "pip", "install"]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "kept.txt"
        constraints.write_text("\n".join(kept) + "\n", encoding="utf-8")
        code = subprocess.run([*pip, *arguments, "-c", str(constraints), "-e", str(ROOT)], check=False).returncode
    return code or subprocess.run([*pip, *arguments, "--no-deps", VBENCH], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
