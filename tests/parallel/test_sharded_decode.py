"""The decode's path on a GPU, on a CPU: two ranks over the process group give one rank's frames."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch import nn

from tests.conftest import ROOT
from tests.parallel import decode_as_on_a_gpu
from tests.ranks import run_ranks
from wan_mlperf.kernels import vae as kernels


@pytest.mark.job
def test_over_the_process_group_with_pytorchs_own_operations(model: Path, tmp_path: Path) -> None:
    videos: list[torch.Tensor] = []
    for ranks in (1, 2):
        file = tmp_path / f"{ranks}.pt"
        run_ranks(decode_as_on_a_gpu.main, model, file, ranks, ranks=ranks)
        videos.append(torch.load(file, weights_only=True).int())
    difference = (videos[0] - videos[1]).abs()
    assert difference.max() <= 1 and (difference > 0).double().mean() < 1e-3
    assert videos[0].float().std() > 1, "a picture, not one colour"


def test_on_a_gpu_weights_lie_with_the_channels_last() -> None:
    """A device that is no CPU stands in for a GPU: nothing is computed on it."""
    videos, images = nn.Conv3d(8, 8, 3, device="meta"), nn.Conv2d(8, 8, 3, device="meta")
    assert kernels.prepare(nn.Sequential(videos, images)) is torch.channels_last_3d
    assert videos.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert images.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 8, 3, 6, 5), (2, 8, 6, 5)])
def test_norms_of_a_gpu_are_as_exact_as_diffusers_and_in_16_bits_more(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = WanRMS_norm(8, images=len(shape) == 4)
    norm.gamma.data = torch.randn_like(norm.gamma)
    ours = copy.deepcopy(norm.to(dtype))
    kernels.fewer_passes(ours, in_16_bits=True)
    frames = (30 * torch.randn(shape)).to(dtype)
    frames[:, :, 0] = 0  # no NaN
    exact = type(norm).forward(copy.deepcopy(norm).double(), frames.double())
    theirs, found = norm(frames), ours(frames)
    assert found.dtype == theirs.dtype == dtype
    error, their_error = ((one - exact).norm() / exact.norm() for one in (found, theirs))
    assert error < (1e-6 if dtype == torch.float32 else 0.8 * their_error)


def test_what_a_gpu_may_do_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("allow_tf32", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    kernels.set_up(torch.device("cuda", 0), tf32=False)
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32
    assert kernels.precision(nn.Conv3d(1, 1, 1), "sm90") == "float32"
    kernels.set_up(torch.device("cuda", 0), tf32=True)
    assert kernels.precision(nn.Conv3d(1, 1, 1), "sm90") == "float32, products in TF32"
    assert kernels.precision(nn.Conv3d(1, 1, 1), "gfx950") == "float32", "it has no TF32"
    assert kernels.precision(nn.Conv3d(1, 1, 1).bfloat16(), "sm90") == "bfloat16"


@pytest.mark.parametrize(("rocm", "own", "expected"), [(True, None, "3"), (True, "1", "1"), (False, None, "")])
def test_miopen_is_told_before_torch_is_imported(rocm: bool, own: str | None, expected: str, tmp_path: Path) -> None:
    folder = tmp_path / "rocm"
    if rocm:
        folder.mkdir()
    code = "import sys, os, wan_mlperf; assert 'torch' not in sys.modules; print(os.environ.get('MIOPEN_FIND_MODE', ''))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MIOPEN_")}
    settings = {"ROCM_PATH": str(folder), **({"MIOPEN_FIND_MODE": own} if own else {})}
    done = subprocess.run([sys.executable, "-c", code], env={**clean, **settings}, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr
