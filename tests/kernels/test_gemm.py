"""The linear references against torchao's emulation and against exact layers; what `convert` turns and what it leaves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wan_mlperf.errors import BadInput
from wan_mlperf.kernels import gemm, probe, sage
from wan_mlperf.kernels import linear as linears
from wan_mlperf.kernels.device import Device
from wan_mlperf.kernels.linear import Fp8Linear, Mxfp4Linear, compute_dtype
from wan_mlperf.recipe import Gemm

CPU = Device(arch="cpu", name="test", torch=torch.device("cpu"))


def no_aiter(_layer: nn.Linear) -> nn.Module:
    raise AssertionError("AITER's layer on a CPU")


def layer(dtype: torch.dtype) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(256, 512).to(dtype).requires_grad_(False), torch.randn(2, 33, 256).to(dtype)


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.float() - exact.float()).norm() / exact.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_the_formats(dtype: torch.dtype) -> None:
    """On Gaussian data MXFP4's error is 15 %, and FP8's 3.7 %."""
    linear, hidden = layer(dtype)
    assert 0.13 < error(Mxfp4Linear(linear)(hidden), linear(hidden)) < 0.17
    assert 0.03 < error(Fp8Linear(linear)(hidden), linear(hidden)) < 0.045


def test_mxfp4_against_torchao() -> None:
    """Ours are torchao's numbers, half-way values included: torchao, AITER's for linear layers and ours round to even."""
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig
    from torchao.quantization import quantize_
    from torchao.quantization.quantize_.common import KernelPreference

    linear, hidden = layer(torch.bfloat16)
    fp4 = torch.float4_e2m1fn_x2
    config = MXDynamicActivationMXWeightConfig(
        activation_dtype=fp4, weight_dtype=fp4, kernel_preference=KernelPreference.EMULATED
    )
    theirs = nn.Sequential(copy.deepcopy(linear))
    quantize_(theirs, config)
    ours = Mxfp4Linear(linear)
    packed: Any = theirs[0].weight
    mine, their = ours._weight().float(), packed.dequantize(torch.bfloat16).float()
    scale = torch.exp2(ours.scales.float() - 127).repeat_interleave(32, dim=-1)
    scaled = (linear.weight.float() / scale).abs().unsqueeze(-1)
    assert (scaled == torch.tensor(sage.E2M1_MIDPOINTS)).any(), "numbers of bf16 lie half-way often: 1 in 40"
    assert torch.equal(mine, their)
    assert error(ours(hidden), theirs(hidden)) < 0.005


def test_a_token_does_not_see_the_others() -> None:
    """No scale spans tokens, so a shard of them gives the same result: Ulysses changes nothing."""
    linear, hidden = layer(torch.float32)
    for kind in (Mxfp4Linear, Fp8Linear):
        whole = kind(linear)(hidden)
        assert torch.allclose(kind(linear)(hidden[:, 5:9]), whole[:, 5:9], rtol=1e-5, atol=1e-5)


def test_packed_weights_are_small(model: Path) -> None:
    from wan_mlperf.checkpoint import Checkpoint

    found = Checkpoint("test", model)
    expert = found.load_transformer("transformer", "bfloat16")
    before = {name for name, one in expert.named_modules() if isinstance(one, nn.Linear)}
    recipe = Gemm(high_noise="mxfp4", keep=(("blocks.1.ffn.*", "bf16"), ("blocks.0.attn1.to_q", "fp8")))
    table = gemm.resolve(recipe, CPU, allow_reference=True, probe=probe.missing_gemm)
    assert table == {"mxfp4": None, "bf16": "TORCH", "fp8": None}
    conversion = gemm.Conversion("mxfp4", recipe, table, CPU, no_aiter)
    expert = found.load_transformer("transformer", "bfloat16", convert=conversion)
    kinds = {name: type(one) for name, one in expert.named_modules()}
    assert kinds["blocks.0.attn1.to_q"] is Fp8Linear
    assert kinds["blocks.1.ffn.net.2"] is nn.Linear
    assert kinds["blocks.0.attn2.to_out.0"] is Mxfp4Linear
    for name in before:
        if not name.startswith("blocks."):
            assert kinds[name] is nn.Linear, name  # embeddings, modulation, output projection
    assert "1 fp8, 17 mxfp4" in conversion.summary()
    packed = [one for one in expert.modules() if isinstance(one, Mxfp4Linear)]
    numbers = sum(one.in_features * one.out_features for one in packed)
    assert sum(gemm.weight_bytes(one) for one in packed) <= 0.28 * 2 * numbers
    assert all(not hasattr(one, "weight") for one in packed)  # the 16-bit copy is gone


def test_what_cannot_run_is_refused() -> None:
    recipe = Gemm(high_noise="mxfp4", low_noise="bf16")
    with pytest.raises(BadInput, match=r"gemm 'mxfp4': cannot run on cpu .* AITER .* on gfx950"):
        gemm.check(recipe, CPU, allow_reference=False)
    gemm.check(recipe, CPU, allow_reference=True)
    gemm.check(recipe, Device(arch="gfx950", name="MI355X", torch=torch.device("cpu")), allow_reference=False)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "mxfp4"])
def test_products_in_fp32_are_as_good_as_those_of_bf16(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs with and without products of bf16 differ by roundings of the result to bf16."""
    linear, hidden = layer(torch.bfloat16)
    make = {"bf16": lambda one: gemm.widen(copy.deepcopy(one)), "fp8": Fp8Linear, "mxfp4": Mxfp4Linear}[kind]
    outs = {}
    for products in (torch.bfloat16, torch.float32):
        for module in (gemm, linears):
            monkeypatch.setattr(module, "compute_dtype", lambda _dtype, _device, products=products: products)
        outs[products] = make(linear)(hidden)
        assert outs[products].dtype == torch.bfloat16
    assert error(outs[torch.float32], outs[torch.bfloat16]) < 2**-8


def test_a_convolution_is_widened_too(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    embedding = nn.Conv3d(16, 32, (1, 2, 2), (1, 2, 2)).to(torch.bfloat16).requires_grad_(False)
    latents = torch.randn(1, 16, 2, 8, 8).to(torch.bfloat16)
    expected = embedding(latents)
    monkeypatch.setattr(gemm, "compute_dtype", lambda _dtype, _device: torch.float32)
    widened = gemm.widen(embedding)(latents)
    assert widened.dtype == torch.bfloat16
    assert error(widened, expected) < 2**-8


def test_fp32_and_gpus_keep_their_products() -> None:
    assert compute_dtype(torch.float32, torch.device("cpu")) == torch.float32
    assert compute_dtype(torch.bfloat16, torch.device("cuda", 0)) == torch.bfloat16
