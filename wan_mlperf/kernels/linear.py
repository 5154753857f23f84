"""Quantised linear layers: what quantises their input, what multiplies, and how layers with one input quantise it once.

A block's Q, K and V share one input, the text's keys and values of all blocks another. `products` quantises it once for all
layers that quantise alike; each output is bit for bit what the layer alone gives.

Shapes: M tokens, K input features, N output features.
"""

from __future__ import annotations

import abc
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from wan_mlperf.errors import BadInput
from wan_mlperf.kernels import sage
from wan_mlperf.step_plan import Layers

BLOCK = 32
PIECE = 1 << 18  # values of a weight that a reference quantises at a time; each takes 40 bytes meanwhile


@functools.cache
def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to multiply numbers of `dtype` in: fp32 for bf16 on a CPU without fast bf16 products, else `dtype`."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return dtype
    fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


class Quantised(nn.Module, abc.ABC):
    """A linear layer that quantises its input. Layers whose `quantises` are equal make the same operands of the same input."""

    in_features: int
    out_features: int
    quantises: tuple[object, ...]

    @abc.abstractmethod
    def multiply_all(self, hidden: torch.Tensor, layers: Sequence[Self]) -> list[torch.Tensor]:
        """[..., K] -> [..., N] of each of the layers, which quantise as this one does."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        return self.multiply_all(hidden, [self])[0]


class InTwoSteps(Quantised):
    """A `Quantised` layer that quantises and multiplies in two separate calls."""

    @abc.abstractmethod
    def quantise(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[..., K] -> the operands of `multiply`."""

    @abc.abstractmethod
    def multiply(self, *operands: torch.Tensor) -> torch.Tensor:
        """What `quantise` returned -> [..., N]."""

    def multiply_all(self, hidden: torch.Tensor, layers: Sequence[Self]) -> list[torch.Tensor]:
        """See `Quantised.multiply_all`."""
        operands = self.quantise(hidden)
        return [layer.multiply(*operands) for layer in layers]


class ByStep(nn.Module):
    """A linear layer held in several formats, of which a step uses one: `select` picks it by the `layers` of the step."""

    def __init__(self, formats: Mapping[str, nn.Module], by_step: Mapping[Layers, str]) -> None:
        super().__init__()
        self.formats = nn.ModuleDict(formats)
        self._by_step = dict(by_step)
        self.now = next(iter(by_step.values()))

    def select(self, layers: Layers) -> None:
        """Use the format of a step with these `layers`."""
        self.now = self._by_step[layers]

    @property
    def current(self) -> nn.Module:
        """The layer in the format selected."""
        return self.formats[self.now]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        out: torch.Tensor = self.current(hidden)
        return out


def products(hidden: torch.Tensor, layers: Sequence[nn.Module]) -> list[torch.Tensor]:
    """Return each layer's output on the same input [..., K], which is quantised once for all that quantise alike."""
    layers = [one.current if isinstance(one, ByStep) else one for one in layers]
    outs: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(layers):
        if number in outs:
            continue
        if not isinstance(layer, Quantised):
            outs[number] = layer(hidden)
            continue
        alike = {
            other: one
            for other, one in enumerate(layers)
            if other >= number and isinstance(one, Quantised) and one.quantises == layer.quantises
        }
        outs.update(zip(alike, layer.multiply_all(hidden, list(alike.values())), strict=True))
    return [outs[number] for number in range(len(layers))]


class _Reference(InTwoSteps):
    """A linear layer with packed weights. `bias` [N] stays in the model's dtype."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = layer.in_features, layer.out_features, layer.weight.dtype
        self.products = compute_dtype(layer.weight.dtype, layer.weight.device)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)


def _by_rows(
    weight: torch.Tensor, quantise: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantise(weight)` a few rows at a time, for a format whose scales never span rows."""
    codes, scales = zip(*map(quantise, weight.split(max(1, PIECE // weight.shape[1]))), strict=True)
    return torch.cat(codes), torch.cat(scales)


class Fp8Linear(_Reference):
    """Float8 reference: E4M3 with one scale per row of the weight and per token, or one per tensor, as torchao's."""

    weight: torch.Tensor  # E4M3 [N, K]
    scales: torch.Tensor  # fp32 [N, 1] or [1, 1]

    def __init__(self, layer: nn.Linear, scales: str = "row") -> None:
        super().__init__(layer)
        self.per_row = scales == "row"
        self.quantises = "fp8", scales, self.products
        weight = layer.weight.detach()
        values, weight_scales = _by_rows(weight, self._packed) if self.per_row else self._packed(weight)
        self.register_buffer("weight", values)
        self.register_buffer("scales", weight_scales)

    def quantise(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[..., K] -> E4M3 numbers [..., K], and their scales."""
        values, scales = self._rounded(hidden)
        return values.to(self.products), scales

    def multiply(self, *operands: torch.Tensor) -> torch.Tensor:
        """See `InTwoSteps.multiply`."""
        values, scales = operands
        out = F.linear(values, self.weight.to(self.products)).float() * scales * self.scales.squeeze(-1)
        return (out if self.bias is None else out + self.bias).to(self.dtype)

    def _packed(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = self._rounded(weight)
        return values.to(torch.float8_e4m3fn), scales

    def _rounded(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return sage.quantise_e4m3(values, (-1,) if self.per_row else tuple(range(values.ndim)))


class Mxfp4Linear(_Reference):
    """MXFP4 reference: E2M1 with one E8M0 scale per 32 input features, both operands, as AITER's quantiser rounds them."""

    codes: torch.Tensor  # uint8 [N, K / 2]
    scales: torch.Tensor  # uint8, E8M0 [N, K / 32]

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        if layer.in_features % BLOCK:
            raise BadInput(f"gemm 'mxfp4': a layer of {layer.in_features} input features; allowed: a multiple of {BLOCK}")
        self.quantises = "mxfp4", self.products
        codes, scales = _by_rows(layer.weight.detach(), functools.partial(sage.quantise_mxfp4, ties_away=False))
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def quantise(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[..., K] -> MXFP4 numbers [..., K]. Each is exact in bf16, so only the products round."""
        return (sage.round_to_mxfp4(hidden, ties_away=False).to(self.products),)

    def multiply(self, *operands: torch.Tensor) -> torch.Tensor:
        """See `InTwoSteps.multiply`."""
        bias = None if self.bias is None else self.bias.to(self.products)
        return F.linear(operands[0], self._weight(), bias).to(self.dtype)

    def _weight(self) -> torch.Tensor:
        # One look-up per byte gives two elements. A scale is a power of two, so its byte is the exponent of a float.
        pairs = _pairs(self.products, self.codes.device).index_select(0, self.codes.view(-1).int()).view(self.products)
        powers = (self.scales.int() << 23).view(torch.float32).to(self.products)
        return pairs.view(self.out_features, -1, BLOCK).mul_(powers.unsqueeze(-1)).view(self.out_features, self.in_features)


@functools.cache
def _pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[256]: the two E2M1 numbers of each byte, the even element in the low nibble, as one integer with the bits of both.

    Looking up one integer per byte is four times as fast on a CPU as looking up a row of two numbers.
    """
    byte = torch.arange(256, device=device, dtype=torch.uint8).unsqueeze(-1)
    ones = torch.full((256, 1), 127, device=device, dtype=torch.uint8)
    pairs = sage.dequantise_mxfp4(byte.expand(-1, 16), ones)[:, :2].to(dtype).contiguous()
    return pairs.view({2: torch.int32, 4: torch.int64}[dtype.itemsize]).view(-1)


class TorchaoLinear(InTwoSteps):
    """torchao's layer, whose weight would quantise every input by itself: here the input is quantised by the same function."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        weight: Any = layer.weight.data
        self._kind: Any = type(weight)
        self._how = weight.act_quant_kwargs
        self._is_mx = hasattr(weight, "elem_dtype")
        self.quantises = "torchao", repr(self._how)
        if not self._is_mx:  # its float8 refuses a quantised input, unless the weight asks for no quantisation
            kept = weight.block_size, weight.mm_config, None, weight.kernel_preference, weight.dtype
            weight = self._kind(weight.qdata, weight.scale, *kept)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def quantise(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[M, K] -> torchao's tensor of a float8 or MX format."""
        how, kind = self._how, self._kind
        if self._is_mx:
            form = how.elem_dtype, how.block_size, how.scaling_mode
            return (kind.to_mx(hidden, *form, how.kernel_preference, how.is_swizzled_scales),)
        form = how.float8_dtype, how.granularity, how.mm_config
        return (kind.from_hp(hidden, *form, how.hp_value_lb, how.hp_value_ub, how.kernel_preference),)

    def multiply(self, *operands: torch.Tensor) -> torch.Tensor:
        """What `quantise` returned -> [M, N]."""
        return F.linear(operands[0], self.weight, self.bias)

    def multiply_all(self, hidden: torch.Tensor, layers: Sequence[Self]) -> list[torch.Tensor]:
        """See `Quantised.multiply_all`."""
        outs = super().multiply_all(hidden.reshape(-1, self.in_features), layers)
        return [out.view(*hidden.shape[:-1], -1) for out in outs]


class AiterLinear(Quantised):
    """xDiT's MXFP4 layer, whose operator quantises its input. Several with one input share one call of AITER's quantiser."""

    quantises = ("aiter", "mxfp4")

    def __init__(self, packed: nn.Module) -> None:
        """`packed`: an xFuserMXFP4Linear with its weights."""
        super().__init__()
        self.packed = packed
        size: Any = packed
        self.in_features, self.out_features = size.in_features, size.out_features

    def multiply_all(self, hidden: torch.Tensor, layers: Sequence[Self]) -> list[torch.Tensor]:
        """See `Quantised.multiply_all`."""
        if len(layers) == 1:
            return [layers[0].packed(hidden)]
        weights, scales = ([getattr(one.packed, name) for one in layers] for name in ("weight_shuffle", "weight_scale"))
        outs = torch.ops.wan_mlperf.mxfp4_products(hidden.reshape(-1, self.in_features), weights, scales)
        biased = [out if one.packed.bias is None else out + one.packed.bias for out, one in zip(outs, layers, strict=True)]
        return [out.view(*hidden.shape[:-1], -1) for out in biased]


@torch.library.custom_op("wan_mlperf::mxfp4_products", mutates_args=(), schema="(Tensor a, Tensor[] w, Tensor[] s) -> Tensor[]")
def _mxfp4_products(a: torch.Tensor, w: list[torch.Tensor], s: list[torch.Tensor]) -> list[torch.Tensor]:
    # AITER's two calls, as xDiT's operator makes them for one layer. They are one operator here, too, so that the compiler need
    # not know how AITER pads the scales.
    aiter: Any = importlib.import_module("aiter")
    codes, scales = aiter.get_hip_quant(aiter.QuantType.per_1x32)(a, shuffle=True)
    return [aiter.gemm_a4w4(codes, one, scales, its, bpreshuffle=True, bias=None) for one, its in zip(w, s, strict=True)]


@_mxfp4_products.register_fake
def _(a: torch.Tensor, w: list[torch.Tensor], _s: list[torch.Tensor]) -> list[torch.Tensor]:
    return [a.new_empty(len(a), len(one)) for one in w]
