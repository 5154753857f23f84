"""The design's floors: each file may import from its own floor and from the ones below it, never from above (docs/design.md)."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.conftest import ROOT

# From the top of the house to its ground.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("wan_mlperf/run.py",),
    (
        *(f"wan_mlperf/{room}/" for room in ("bench", "generate", "report", "search", "serve", "submit", "vbench")),
        "wan_mlperf/predict/__main__.py",  # the commands; what they rest on lies below, as a run's record asks it, too
        "wan_mlperf/predict/fit_command.py",
    ),
    ("sut/",),
    ("wan_mlperf/cli.py", "wan_mlperf/doctor/", "wan_mlperf/predict/", "wan_mlperf/shapes/", "wan_mlperf/videos/"),
    ("wan_mlperf/replicas/",),
    ("wan_mlperf/pipeline.py",),
    ("wan_mlperf/preflight.py",),
    ("wan_mlperf/parallel/",),
    ("wan_mlperf/denoise.py", "wan_mlperf/experts.py", "wan_mlperf/text_encoder.py", "wan_mlperf/vae_decode.py"),
    ("wan_mlperf/kernels/",),
    tuple(f"wan_mlperf/{name}.py" for name in ("checkpoint", "step_plan", "division", "video", "spans")),
    ("wan_mlperf/recipe/", "wan_mlperf/workload.py", "wan_mlperf/model_folder/"),
    (
        *(f"wan_mlperf/{name}.py" for name in ("errors", "files", "identity", "process", "ranks")),
        *(f"wan_mlperf/{room}/" for room in ("inputs", "pages", "published")),
    ),
)
# Rooms do not know each other, but for these.
NEIGHBOURS = {
    ("wan_mlperf/search/", "wan_mlperf/bench/"),
    ("wan_mlperf/bench/", "wan_mlperf/serve/"),
    ("wan_mlperf/submit/", "wan_mlperf/vbench/"),
    ("wan_mlperf/report/", "wan_mlperf/vbench/"),
    ("wan_mlperf/predict/__main__.py", "wan_mlperf/predict/fit_command.py"),
}
# What may be imported only from certain places, whatever the floor. The longest name that covers a module decides.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "mlperf_loadgen": ("sut/",),
    "aiter": ("wan_mlperf/kernels/",),
    "xfuser": ("wan_mlperf/parallel/",),
    "distvae": ("wan_mlperf/parallel/",),
    "yunchang": ("wan_mlperf/parallel/",),
    "torch.distributed": ("wan_mlperf/parallel/", "wan_mlperf/replicas/"),
    "tools": (),
    **dict.fromkeys(("starlette", "uvicorn", "prometheus_client"), ("wan_mlperf/serve/",)),
    # The worker runs in VBench's own environment, under another interpreter.
    "vbench": ("wan_mlperf/vbench/worker.py",),
}
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


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


def place(name: str) -> tuple[int, str] | None:
    """(floor, file or folder) of a file's name; None outside the house, and for the package's own __init__.py."""
    for floor, places in enumerate(FLOORS):
        for one in places:
            if name == one or (one.endswith("/") and name.startswith(one)):
                return floor, one
    return None


def file_of(module: str) -> str:
    """The file's name that an imported module has, as far as `place` needs it."""
    parts = module.split(".")
    if parts[0] == "sut":
        return "sut/"
    top = "/".join(parts[:2])
    return f"{top}.py" if place(f"{top}.py") else f"{top}/"


def violations(file: Path, name: str) -> list[str]:
    """What a file imports that it may not."""
    wrong = []
    own = place(name)
    for module in imports(file):
        covering = [package for package in ONLY_IN if module == package or module.startswith(package + ".")]
        if covering and not any(name.startswith(one) for one in ONLY_IN[max(covering, key=len)]):
            wrong.append(f"{name} imports {module}")
        target = place(file_of(module)) if module.split(".")[0] in ("wan_mlperf", "sut") else None
        if own is None or target is None or target == own:
            continue
        if target[0] < own[0]:
            wrong.append(f"{name} imports {module}, from above")
        elif target[0] == own[0] and own[0] == 1 and (own[1], target[1]) not in NEIGHBOURS:
            wrong.append(f"{name} imports {module}, another room")
    return wrong


def sources() -> dict[str, Path]:
    """Every file of the house by its name."""
    files = [*ROOT.glob("wan_mlperf/**/*.py"), *ROOT.glob("sut/**/*.py")]
    return {file.relative_to(ROOT).as_posix(): file for file in files}


def test_every_file_keeps_the_rules() -> None:
    files = sources()
    assert len(files) > 60
    assert [one for name, file in files.items() for one in violations(file, name)] == []


def test_every_file_has_a_floor() -> None:
    assert [name for name in sources() if place(name) is None] == ["wan_mlperf/__init__.py"]


def test_a_violation_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text("import torch.distributed as dist\nfrom sut.loadgen import run\nimport torch\n")
    assert len(violations(file, "wan_mlperf/denoise.py")) == 2
    file.write_text("from wan_mlperf import cli\nfrom wan_mlperf.pipeline import Pipeline\n")
    assert sorted(violations(file, "wan_mlperf/parallel/mesh.py")) == [
        "wan_mlperf/parallel/mesh.py imports wan_mlperf.cli, from above",
        "wan_mlperf/parallel/mesh.py imports wan_mlperf.pipeline.Pipeline, from above",
    ]
    file.write_text("from wan_mlperf.vbench import score\n")
    assert violations(file, "wan_mlperf/submit/campaign.py") == []
    assert violations(file, "wan_mlperf/generate/__main__.py") == [
        "wan_mlperf/generate/__main__.py imports wan_mlperf.vbench.score, another room"
    ]


def test_only_ranks_reads_torchruns_environment() -> None:
    readers = [
        name
        for name, file in sources().items()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in TORCHRUN
    ]
    assert set(readers) == {"wan_mlperf/ranks.py"}


def test_only_device_asks_whether_there_is_a_gpu() -> None:
    """How torch was built, or that one place found a GPU, must not decide anything elsewhere."""
    questions = {"torch.cuda.is_available", "torch.cuda.device_count", "torch.version.cuda", "torch.version.hip"}
    files = {**sources(), **{file.relative_to(ROOT).as_posix(): file for file in ROOT.glob("tools/**/*.py")}}
    asking = [
        name
        for name, file in files.items()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and (ast.unparse(node) in questions or ast.unparse(node) == "torch.accelerator")
    ]
    assert set(asking) == {"wan_mlperf/kernels/device.py"}


def test_the_house_stays_small() -> None:
    long_files, long_functions = [], []
    for name, file in sources().items():
        text = file.read_text(encoding="utf-8")
        if text.count("\n") > 300:
            long_files.append(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > 60:
                long_functions.append(f"{name}: {node.name}")
    assert long_files == [] and long_functions == []
    assert len(list((ROOT / "wan_mlperf").glob("*.py"))) <= 20
