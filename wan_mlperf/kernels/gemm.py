"""Linear layers by format: bf16 (as the checkpoint has them), fp8, mxfp4; what each is on which device.

On a GPU the layers are xDiT's (AITER, gfx950) or torchao's. Elsewhere they are references (linear.py), if the recipe allows them:
packed weights in the same formats, operands rounded to the same numbers, products in the model's dtype or a wider one. torchao's
own emulation of MXFP4 is no alternative: it accepts only bf16 and takes several times as long per layer at the embedded model's
size; and its FP8 does not run without a GPU. tests/kernels/test_gemm.py compares these references with torchao.

A CPU without AVX-512 has no fast bf16 products: PyTorch then takes 10 to 50 times as long as in fp32. On such a CPU the
references, and what remains in bf16 (`widen`), multiply in fp32 and round the sum once, as a fast bf16 product does too.

Shapes: M tokens, K input features, N output features.
"""

from __future__ import annotations

import fnmatch
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from wan_mlperf.errors import BadInput
from wan_mlperf.kernels.backends import GEMM_CANDIDATES, NEEDS
from wan_mlperf.kernels.device import Device
from wan_mlperf.kernels.linear import AiterLinear, ByStep, Fp8Linear, Mxfp4Linear, TorchaoLinear, compute_dtype
from wan_mlperf.recipe import Gemm
from wan_mlperf.step_plan import Layers

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

NativeLinear = Callable[[nn.Linear], nn.Module]
Backends = Mapping[str, "str | None"]  # format -> key of GEMM, None for a reference
Probe = Callable[[str], "str | None"]  # key of GEMM -> None, or what is missing for it on this machine

FP8_FLOOR = 1e-12  # lower bound of the amax behind an FP8 scale: without it a row of zeros would become NaN


def backend(name: str, arch: str) -> str | None:
    """Return the key of GEMM that multiplies in a format on an architecture, or None."""
    by_arch = GEMM_CANDIDATES[name]
    return by_arch.get(arch, by_arch.get("any"))


def names(recipe: Gemm) -> tuple[str, ...]:
    """Return the formats of a recipe's linear layers."""
    return tuple(dict.fromkeys((recipe.high_noise, recipe.low_noise, *(rule.format for rule in recipe.rules))))


def linear_names(blocks: int) -> list[str]:
    """Return the names of an expert's linear layers that have a format: those of its blocks, as in diffusers' transformer."""
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    layers = [*(f"{attn}.{one}" for attn in ("attn1", "attn2") for one in attention), "ffn.net.0.proj", "ffn.net.2"]
    return [f"blocks.{number}.{layer}" for number in range(blocks) for layer in layers]


def check(recipe: Gemm, device: Device, *, allow_reference: bool) -> None:
    """Raise BadInput for a format that the architecture cannot compute, unless references are allowed."""
    for name in names(recipe):
        if backend(name, device.arch) is None and not allow_reference:
            raise _refusal(name, device, "")


def resolve(recipe: Gemm, device: Device, *, allow_reference: bool, probe: Probe) -> dict[str, str | None]:
    """Return format -> key of GEMM, or None for a reference. Raises BadInput for a format that cannot run.

    `probe` says what a key of GEMM lacks on this machine.
    """
    table: dict[str, str | None] = {}
    for name in names(recipe):
        key = backend(name, device.arch)
        problem = None if key is None else probe(key)
        if (key is None or problem is not None) and not allow_reference:
            raise _refusal(name, device, "" if problem is None else f" ({key}: {problem})")
        table[name] = key if problem is None else None
    return table


def _refusal(name: str, device: Device, tried: str) -> BadInput:
    return BadInput(
        f"gemm {name!r}: cannot run on {device.arch} ({device}){tried}; it needs {NEEDS[name]}; "
        "allowed here: bf16, or references: allow"
    )


def widen(model: nn.Module) -> nn.Module:
    """Make the bf16 linear layers and convolutions of `model` multiply in fp32 if `compute_dtype` says so."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv3d):
            products = compute_dtype(layer.weight.dtype, layer.weight.device)
            if products != layer.weight.dtype:
                layer.forward = MethodType(functools.partial(_in, products), layer)  # type: ignore[method-assign]
    return model


def _in(products: torch.dtype, layer: nn.Linear | nn.Conv3d, hidden: torch.Tensor) -> torch.Tensor:
    weight = layer.weight.to(products)
    bias = None if layer.bias is None else layer.bias.to(products)
    out = (
        F.linear(hidden.to(products), weight, bias)
        if isinstance(layer, nn.Linear)
        else layer._conv_forward(hidden.to(products), weight, bias)
    )
    return out.to(hidden.dtype)


class Conversion:
    """Converts each linear layer of an expert's blocks as the recipe says; the `convert` of model_folder/expert_weights.py.

    `variants` are the `layers` of a plan's steps: patterns of layer names (such as "blocks.0.*" or "*.ffn.*") with a format other
    than `name`; without a plan, those of `recipe.keep` for every step. A layer whose format changes over the steps is held in
    each format (`ByStep`). `table` is what `resolve` returned. Norms, embeddings, modulation and the output projection stay
    as they are. `aiter_linear` makes xDiT's layer for gfx950. Safe to call from several threads.
    """

    def __init__(
        self,
        name: str,
        recipe: Gemm,
        table: Backends,
        device: Device,
        aiter_linear: NativeLinear,
        variants: Sequence[Layers] = (),
    ) -> None:
        self._name, self._scales, self._table = name, recipe.fp8_scales, table
        self._device, self._aiter_linear = device, aiter_linear
        self._variants = variants or [tuple((rule.layers, rule.format) for rule in recipe.rules if rule.steps is None)]
        self._made: dict[str, tuple[str, int, int]] = {}  # layer -> formats, numbers, bytes

    def __call__(self, full: str, layer: nn.Module) -> nn.Module:
        """Return what replaces `layer`, the module named `full`; the caller frees the 16-bit one."""
        if not full.startswith("blocks.") or not isinstance(layer, nn.Linear):
            return layer
        chosen = {rules: format_of(full, self._name, rules) for rules in self._variants}
        kinds, numbers = list(dict.fromkeys(chosen.values())), layer.weight.numel()
        made = {one: self._make(_again(layer) if len(kinds) > 1 else layer, one) for one in kinds}
        new = made[kinds[0]] if len(kinds) == 1 else ByStep(made, chosen)
        self._made[full] = " and ".join(kinds), numbers, weight_bytes(new)
        return new

    def _make(self, layer: nn.Linear, name: str) -> nn.Module:
        return _make(layer, name, self._scales, self._table[name], self._device, self._aiter_linear)

    def summary(self) -> str:
        """One line for the load summary."""
        counts = Counter(kinds for kinds, _, _ in self._made.values())
        numbers = sum(one for _, one, _ in self._made.values())
        packed = sum(one for _, _, one in self._made.values())
        formats = ", ".join(f"{count} {kinds}" for kinds, count in sorted(counts.items()))
        return f"{formats} linear layers, {packed / 1e6:.1f} MB of weights, {packed / max(1, 2 * numbers):.3f} of bf16's"


def format_of(layer: str, name: str, rules: Layers) -> str:
    """Return the format of a layer in an expert of format `name`."""
    return next((kept for pattern, kept in rules if fnmatch.fnmatch(layer, pattern)), name)


def _again(layer: nn.Linear) -> nn.Linear:
    """A second layer with the same weights, so that converting it in place leaves the first one as it is."""
    with torch.device("meta"):
        new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    new.weight, new.bias = layer.weight, layer.bias
    return new


def weight_bytes(layer: nn.Module) -> int:
    """Return the bytes of a layer's weights and their scales, without the bias."""
    total = 0
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if name.rpartition(".")[2] != "bias":
            total += sum(part.numel() * part.element_size() for part in _storages(tensor))
    return total


def _storages(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the plain tensors inside a tensor: torchao's consist of several."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, name))
    else:
        yield tensor


def _make(layer: nn.Linear, name: str, fp8_scales: str, key: str | None, device: Device, aiter_linear: NativeLinear) -> nn.Module:
    if name == "bf16":
        return layer
    layer = layer.to(device.torch)  # a reference asks the device what it multiplies in
    if key is None:
        return Fp8Linear(layer, fp8_scales) if name == "fp8" else Mxfp4Linear(layer)
    return AiterLinear(aiter_linear(layer)) if key == "AITER_A4W4" else _torchao(layer, name, fp8_scales)


def _torchao(layer: nn.Linear, name: str, fp8_scales: str) -> nn.Module:
    from torchao.quantization import quantize_

    quantize_(layer, fp8_config(fp8_scales) if name == "fp8" else _mxfp4_config())
    if type(layer.weight.data) in (torch.Tensor, nn.Parameter):  # torchao silently leaves a shape that it cannot multiply
        shape = f"{layer.in_features} to {layer.out_features} features"
        raise BadInput(f"gemm {name!r}: torchao has no kernel for a layer of {shape}; allowed: multiples of 16, or gemm.keep")
    return TorchaoLinear(layer)


def fp8_config(scales: str) -> AOBaseConfig:
    """Return torchao's configuration of FP8 layers. Weights and activations have one scale per "row" or per "tensor"."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, PerTensor
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    return Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow() if scales == "row" else PerTensor(),
        activation_value_lb=FP8_FLOOR,
        kernel_preference=KernelPreference.TORCH,  # AUTO takes mslk's where it is installed: they fail under torch.compile
        set_inductor_config=False,  # else it turns on coordinate-descent tuning for everything compiled in this process
    )


def _mxfp4_config() -> AOBaseConfig:
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig

    fp4 = torch.float4_e2m1fn_x2
    return MXDynamicActivationMXWeightConfig(activation_dtype=fp4, weight_dtype=fp4)
