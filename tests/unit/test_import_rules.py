"""The design's import rules: who may know of LoadGen, of devices, of ranks."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.conftest import ROOT

# package -> files and folders that may import it
ALLOWED = {
    "sut": ("sut/", "wan_mlperf/run.py", "wan_mlperf/submit.py"),
    "mlperf_loadgen": ("sut/",),
    "aiter": ("wan_mlperf/kernels/",),
    "xfuser": ("wan_mlperf/parallel/",),
    "distvae": ("wan_mlperf/parallel/",),
    "yunchang": ("wan_mlperf/parallel/",),
    # cli.py starts torchrun, through torch's library of that name: no rank is involved.
    "torch.distributed": ("wan_mlperf/parallel/",),
    "torch.distributed.launcher": ("wan_mlperf/cli.py",),
    "torch.distributed.elastic": ("wan_mlperf/cli.py",),
    "tools": (),
    "vbench": (),
}


def imports(file: Path) -> set[str]:
    """Full names of the modules that a file imports, importlib.import_module("...") included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name == "import_module":
                names.add(str(node.args[0].value))
    return names


def rule(module: str) -> tuple[str, ...] | None:
    """Where a module may be imported: the longest rule that covers it; None if there is no rule."""
    covering = [package for package in ALLOWED if module == package or module.startswith(package + ".")]
    return ALLOWED[max(covering, key=len)] if covering else None


def violations(file: Path, name: str) -> list[str]:
    wrong = []
    for module in imports(file):
        places = rule(module)
        if places is not None and not any(name == place or (place.endswith("/") and name.startswith(place)) for place in places):
            wrong.append(f"{name} imports {module}")
    return wrong


def test_every_file_keeps_the_rules() -> None:
    files = [*ROOT.glob("wan_mlperf/**/*.py"), *ROOT.glob("sut/**/*.py")]
    assert len(files) > 25
    wrong = [one for file in files for one in violations(file, file.relative_to(ROOT).as_posix())]
    # The worker imports vbench inside functions that run only in VBench's own environment, under another interpreter.
    assert [one for one in wrong if not one.startswith("wan_mlperf/vbench_worker.py imports vbench")] == []


def test_a_violation_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "denoise.py"
    file.write_text("import torch.distributed as dist\nfrom sut.loadgen import run\nimport torch\n")
    assert len(violations(file, "wan_mlperf/denoise.py")) == 2
