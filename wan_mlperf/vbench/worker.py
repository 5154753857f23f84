"""Scores one VBench dimension. It runs in VBench's environment, so it imports nothing from this project.

`python -I worker.py JOB.json` scores; `--check DIMENSION...` imports everything and prints the versions. A job contains
`dimension`, `device`, `videos` (the staged folder), `output` (where the result goes) and `identity` (copied into the result).
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("vbench", "torch", "torchvision", "transformers", "timm", "openai-clip", "numpy", "opencv-python-headless")
_declared: list[object] = []


def declare_torchvision_operators() -> None:
    """Make `import torchvision` work with a torch that its compiled part was not built for.

    VBench uses only torchvision's Python transforms. But importing the package registers kernels for operators that the compiled
    part should have declared. Each missing operator is declared here; none is ever called.
    """
    import torch

    while True:
        try:
            importlib.import_module("torchvision")
            return
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define(f"{missing[1]}() -> ()")
        _declared.append(library)  # a declaration lasts as long as its object


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a score depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def check(dimensions: list[str]) -> None:
    """Import these dimensions and print the versions as one JSON line."""
    for dimension in dimensions:
        importlib.import_module(f"vbench.{dimension}")
    print(json.dumps(versions()))


def score(job: dict[str, Any]) -> None:
    """Score the staged videos in `job["dimension"]` and write the result to `job["output"]`, completely or not at all."""
    import torch
    import vbench

    dimension, output = job["dimension"], Path(job["output"])
    # The reference passes a torch.device. A plain "cuda" would let motion_smoothness shrink the video on a small GPU.
    device = torch.device(job["device"])
    full_info = str(Path(vbench.__file__).parent / "VBench_full_info.json")
    start = time.perf_counter()
    # VBench runs Tag2Text and CLIP with gradients on, which keeps every activation: over 22 GB for one video in `scene`.
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        vbench.VBench(device, full_info, scratch).evaluate(
            videos_path=job["videos"], name=dimension, dimension_list=[dimension], local=True, mode="vbench_standard"
        )
        mean, videos = json.loads((Path(scratch) / f"{dimension}_eval_results.json").read_text())[dimension]
    for video in videos:
        video["name"] = Path(video.pop("video_path")).name
    result = {
        "dimension": dimension,
        "mean": mean,
        "videos": videos,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "seconds": round(time.perf_counter() - start, 1),
        "versions": versions(),
        **job["identity"],
    }
    unfinished = output.with_suffix(".partial")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(unfinished, output)


if __name__ == "__main__":
    declare_torchvision_operators()
    if sys.argv[1] == "--check":
        check(sys.argv[2:])
    else:
        score(json.loads(Path(sys.argv[1]).read_text()))
