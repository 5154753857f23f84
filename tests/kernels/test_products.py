"""Layers with one input quantise it once, and give bit for bit what each gives alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from wan_mlperf.kernels import gemm, sage
from wan_mlperf.kernels.linear import AiterLinear, Fp8Linear, InTwoSteps, Mxfp4Linear, TorchaoLinear, products

Make = Callable[[nn.Linear], nn.Module]


def plain(count: int = 3, dtype: torch.dtype = torch.bfloat16) -> tuple[list[nn.Linear], torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 96 + 32 * number).to(dtype).requires_grad_(False) for number in range(count)]
    hidden = torch.randn(2, 33, 64).to(dtype)
    hidden[0, 3] = 0
    return layers, hidden


def counted(monkeypatch: pytest.MonkeyPatch, kind: type[InTwoSteps]) -> list[int]:
    """How often layers of this kind quantise from here on."""
    calls: list[int] = []
    whole = kind.quantise

    def quantise(layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        calls.append(hidden.numel())
        return whole(layer, hidden)

    monkeypatch.setattr(kind, "quantise", quantise)
    return calls


def as_torchao(config: Any) -> Make:
    from torchao.quantization import quantize_

    def make(layer: nn.Linear) -> nn.Module:
        quantize_(layer, config)
        return TorchaoLinear(layer)

    return make


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("make", [Mxfp4Linear, Fp8Linear, lambda layer: Fp8Linear(layer, "tensor")], ids=["fp4", "row", "tensor"])
def test_references(make: Make, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, hidden = plain(dtype=dtype)
    quantised = [make(layer) for layer in layers]
    alone = [layer(hidden) for layer in quantised]
    calls = counted(monkeypatch, type(quantised[0]))  # type: ignore[arg-type]
    together = products(hidden, quantised)
    assert len(calls) == 1
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def test_formats_that_differ_are_quantised_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `gemm.keep`; and one in 16 bits takes the input as it is."""
    layers, hidden = plain(5)
    kinds: list[Make] = [Fp8Linear, Mxfp4Linear, nn.Identity, Fp8Linear, lambda layer: Fp8Linear(layer, "tensor")]
    mixed = [make(layer) if make is not nn.Identity else layer for make, layer in zip(kinds, layers, strict=True)]
    alone = [layer(hidden) for layer in mixed]
    calls = counted(monkeypatch, Fp8Linear), counted(monkeypatch, Mxfp4Linear)
    together = products(hidden, mixed)
    assert [len(one) for one in calls] == [2, 1]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


@pytest.mark.parametrize("scales", ["row", "tensor", "mxfp4"])
def test_torchao(scales: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torchao's own layers. It is told that there is a GPU with FP8; its products then run on the CPU, too."""
    from torchao.float8 import inference
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig
    from torchao.quantization import quantize_
    from torchao.quantization.quantize_.common import KernelPreference

    monkeypatch.setattr(inference, "is_MI300", lambda: True)
    fp4 = torch.float4_e2m1fn_x2
    emulated = KernelPreference.EMULATED  # sm100's product is missing here; what quantises is the same
    mx = MXDynamicActivationMXWeightConfig(activation_dtype=fp4, weight_dtype=fp4, kernel_preference=emulated)
    config = mx if scales == "mxfp4" else gemm.fp8_config(scales)
    layers, hidden = plain()
    theirs = []
    for layer in plain()[0]:
        quantize_(layer, config)
        theirs.append(layer(hidden))
    ours = [as_torchao(config)(layer) for layer in layers]
    calls = counted(monkeypatch, TorchaoLinear)
    together = products(hidden, ours)
    assert len(calls) == 1
    assert all(torch.equal(one, other) for one, other in zip(together, theirs, strict=True))
    assert torch.equal(ours[1](hidden), theirs[1])
    if scales != "mxfp4":  # torchao's own MX layer does not compile without its kernels
        compiled = torch.compile(products, backend="aot_eager", fullgraph=True)
        with torch.inference_mode():
            assert all(torch.equal(one, other) for one, other in zip(compiled(hidden, ours), theirs, strict=True))


@pytest.fixture
def aiter(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """AITER's two calls by our references, without its layouts, and what was quantised. tests/aiter has the real ones."""
    from wan_mlperf.parallel import xdit

    xdit.load()
    quantised: list[tuple[int, ...]] = []

    def quantise(values: torch.Tensor, shuffle: bool) -> tuple[torch.Tensor, torch.Tensor]:
        assert shuffle and values.ndim == 2
        quantised.append(tuple(values.shape))
        return sage.quantise_mxfp4(values, ties_away=False)

    def gemm_a4w4(a: Any, b: Any, a_scale: Any, b_scale: Any, *, bpreshuffle: bool, bias: None = None) -> torch.Tensor:
        assert bpreshuffle and bias is None
        left, right = sage.dequantise_mxfp4(a, a_scale), sage.dequantise_mxfp4(b, b_scale)
        return (left @ right.T).bfloat16()

    made = SimpleNamespace(QuantType=SimpleNamespace(per_1x32=1), get_hip_quant=lambda _kind: quantise, gemm_a4w4=gemm_a4w4)
    module = __import__("importlib").import_module("xfuser.model_executor.layers.mxfp4_linear")
    monkeypatch.setitem(sys.modules, "aiter", made)
    monkeypatch.setattr(module, "aiter", made, raising=False)
    monkeypatch.setattr(module, "shuffle_weight", lambda codes, layout: codes, raising=False)
    return quantised


def test_aiter(aiter: list[tuple[int, ...]]) -> None:
    """Against xDiT's own layer, eager and compiled: one graph, no break."""
    from wan_mlperf.parallel import xdit

    layers, hidden = plain()
    layers[1].bias = None  # type: ignore[assignment]
    ours = [AiterLinear(xdit.mxfp4_linear(layer)) for layer in layers]
    alone: Sequence[torch.Tensor] = [one.packed(hidden) for one in ours]
    assert len(aiter) == 3 + 3  # the weights, and the input three times
    together = products(hidden, ours)
    assert aiter[6:] == [(66, 64)]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    assert torch.equal(ours[0](hidden), alone[0])
    compiled = torch.compile(products, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        assert all(torch.equal(one, other) for one, other in zip(compiled(hidden, ours), alone, strict=True))
