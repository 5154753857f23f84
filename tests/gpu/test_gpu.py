"""What only a GPU can show: its kernels against the references and exact attention. Run with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wan_mlperf.errors import BadInput
from wan_mlperf.kernels import attention, gemm
from wan_mlperf.kernels.backends import ATTENTION
from wan_mlperf.kernels.device import gpu_count, probe
from wan_mlperf.kernels.linear import Fp8Linear, Mxfp4Linear
from wan_mlperf.kernels.numerics import SIXTEEN_BITS
from wan_mlperf.kernels.probe import missing_gemm
from wan_mlperf.kernels.reference import reference
from wan_mlperf.recipe import Gemm, GemmName

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu_count() == 0, reason="this host has no GPU")]


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.float() - exact.float()).norm() / exact.float().norm())


@pytest.mark.parametrize("name", ["sdpa", "sage_fp8", "sage_fp4"])
def test_attention_kernels(name: str) -> None:
    """Every name that this GPU runs, through xDiT, against exact attention: as close as its format, as the reference is."""
    from wan_mlperf.parallel import mesh, split_experts, xdit

    mesh.start(mesh.Shape(replicas=1, cfg=1, ulysses=1, ring=1), probe())
    try:
        kernels = attention.resolve([name], probe(), references=None, probe=xdit.check_backend)
    except BadInput as refusal:
        assert "it needs" in str(refusal)
        pytest.skip(str(refusal))
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 40, 1024, 128, device=probe().torch, dtype=torch.bfloat16) for _ in range(3))
    exact = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    self_attend, _ = split_experts.attends(kernels)
    measured = error(self_attend(query, key, value, name, 1024), exact)
    limit = {"sdpa": 0.01, "sage_fp8": 0.08, "sage_fp4": 0.20}[name]
    assert measured < limit


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_linear_layers(name: GemmName) -> None:
    """The GPU's layer against the reference of the same format."""
    from wan_mlperf.parallel import xdit

    recipe = Gemm(high_noise=name, low_noise=name)
    try:
        table = gemm.resolve(recipe, probe(), allow_reference=False, probe=missing_gemm)
    except BadInput as refusal:
        pytest.skip(str(refusal))
    torch.manual_seed(0)
    layer = torch.nn.Linear(512, 1024, device=probe().torch, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(1, 256, 512, device=probe().torch, dtype=torch.bfloat16)
    exact = layer(hidden)
    reference = {"fp8": Fp8Linear, "mxfp4": Mxfp4Linear}[name](layer)(hidden)
    native = gemm.Conversion(name, recipe, table, probe(), xdit.mxfp4_linear)("blocks.0", layer)(hidden)
    assert error(native, exact) < 1.2 * error(reference, exact) + 0.01


def test_references_are_the_same_on_the_gpu() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, 300, 128) for _ in range(3))
    for function in {reference(backend.numerics) for backend in ATTENTION.values() if backend.numerics != SIXTEEN_BITS}:
        there = function(*(one.to(probe().torch) for one in (query, key, value))).cpu()
        assert error(there, function(query, key, value)) < 0.01


def test_the_pipeline_streams_from_the_gpu(model: Path) -> None:
    """Pinned copies on a separate stream give the same frames as the CPU, except for rounding."""
    from wan_mlperf import Pipeline, load_recipe

    recipe = load_recipe("tiny", overrides=[f"model.checkpoint={model}", "mesh.ranks=1"], exact=True)
    pipeline = Pipeline.load(recipe)
    chunks = list(pipeline.stream("a red circle"))
    assert np.array_equal(np.concatenate(chunks), pipeline.generate("a red circle"))
    from diffusers import WanPipeline

    theirs = WanPipeline.from_pretrained(model).to(probe().torch)
    workload = pipeline.workload
    video = theirs(
        prompt="a red circle",
        negative_prompt=workload.negative_prompt,
        height=workload.height,
        width=workload.width,
        num_frames=workload.frames,
        num_inference_steps=workload.steps,
        guidance_scale=workload.guidance_high,
        guidance_scale_2=workload.guidance_low,
        generator=torch.Generator().manual_seed(workload.seed),
        output_type="np",
    ).frames[0]
    difference = abs((video * 255).astype(np.uint8).astype(int) - np.concatenate(chunks).astype(int))
    assert difference.max() <= 2
