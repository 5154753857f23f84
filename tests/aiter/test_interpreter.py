"""AITER's own kernels in Triton's interpreter, from a recipe with `references: forbid` to the frames of a tiny video.

`make test-aiter AITER_SRC=FOLDER`, with a checkout of github.com/ROCm/aiter; skipped without one. bring_up.py says what stands in
for what. Measured with AITER at e4048607: latents 1.5 % from the references' (bf16, 2 layers, 3 steps); a single call 1.3 %
(tests/kernels/test_aiter_calls.py). The rest is the interpreter's truncation to bf16, which every layer and step passes on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, run_module
from wan_mlperf import Pipeline, load_recipe

SOURCE = os.environ.get("AITER_SRC", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SOURCE, reason="AITER_SRC names no checkout of AITER")]
VIDEO = ["workload.height=64", "workload.width=64", "workload.frames=17", "workload.steps=3", "mesh.ranks=1"]
SCHEDULE = ["attention.early_fraction=0.5", "attention.smooth_k=true"]  # both kernels, those that smooth K


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


@pytest.mark.timeout(1800)
def test_a_video_by_aiters_kernels(model: Path, tmp_path: Path) -> None:
    job = {"model": str(model), "overrides": [*VIDEO, *SCHEDULE, "references=forbid"]}
    done = run_module(["tests.aiter.run", SOURCE, str(tmp_path / "video.pt"), json.dumps(job)], timeout=1700)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = torch.load(tmp_path / "video.pt", weights_only=True)
    assert theirs["kernels"]["sage_fp4"] == "xDiT AITER_SAGE_V2" and theirs["kernels"]["sage_fp8"] == "xDiT AITER_SAGE"
    assert "xFuserMXFP4Linear" in theirs["layers"] and theirs["frames"].shape == (17, 64, 64, 3)
    overrides = [f"model.checkpoint={model}", *VIDEO, *SCHEDULE, "references=allow"]
    ours = Pipeline.load(load_recipe("tiny", overrides=overrides)).latents(["a red circle moving left"])
    assert error(theirs["latents"], ours) < 0.03


def test_the_recorded_calls_are_what_this_aiter_gives(tmp_path: Path) -> None:
    done = run_module(["tests.aiter.run", SOURCE, str(tmp_path / "calls.safetensors"), "{}"], timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    now, recorded = load_file(tmp_path / "calls.safetensors"), load_file(ROOT / "tests/kernels/aiter_calls.safetensors")
    assert now.keys() == recorded.keys()
    for name, tensor in recorded.items():
        assert error(now[name], tensor) < 1e-3, name
