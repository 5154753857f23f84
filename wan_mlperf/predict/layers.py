"""Stand-ins for quantised linear layers: packed weights of the right size; each call is counted instead of computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from wan_mlperf.kernels.gemm import format_of
from wan_mlperf.kernels.linear import BLOCK, ByStep, InTwoSteps
from wan_mlperf.predict.counting import Counting
from wan_mlperf.step_plan import Layers


class RecordedLinear(InTwoSteps):
    """A linear layer in a format (fp8: E4M3 and a scale per row; mxfp4: E2M1 and a scale per 32 values) that only counts."""

    def __init__(self, layer: nn.Linear, form: str, counting: Counting) -> None:
        super().__init__()
        outputs, inputs = layer.weight.shape
        self.in_features, self.out_features = inputs, outputs
        self.bias = layer.bias
        self.quantises = (form,)
        self._packed = {"fp8": inputs + 4, "mxfp4": inputs // 2 + inputs // BLOCK}[form]  # bytes of a row
        self.register_buffer("packed", torch.empty(outputs, self._packed, dtype=torch.uint8, device=layer.weight.device))
        self.packed: torch.Tensor
        self._form, self._counting, self._dtype = form, counting, layer.weight.dtype

    def quantise(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[..., K] -> a token's packed bytes [..., bytes]."""
        operand = torch.empty(*hidden.shape[:-1], self._packed, dtype=torch.uint8, device=hidden.device)
        self._counting.record(f"quantise {self._form}", 0.0, (hidden,), (operand,))
        return (operand,)

    def multiply(self, *operands: torch.Tensor) -> torch.Tensor:
        """Packed bytes -> [..., N]."""
        (operand,) = operands
        rows = operand.numel() // self._packed
        out = torch.empty(*operand.shape[:-1], self.out_features, dtype=self._dtype, device=operand.device)
        flops = 2.0 * rows * self.in_features * self.out_features
        shapes = f"{rows} x {self.in_features} x {self.out_features}"
        self._counting.record(f"gemm {self._form}", flops, (operand, self.packed), (out,), shapes)
        return out


def convert(expert: nn.Module, form: str, variants: Sequence[Layers], counting: Counting) -> None:
    """Replace the linear layers of an expert's blocks by stand-ins in the formats that kernels/gemm.py chooses."""
    for name, layer in list(expert.named_modules()):
        if name.startswith("blocks.") and isinstance(layer, nn.Linear):
            chosen = {rules: format_of(name, form, rules) for rules in variants}
            made = {one: layer if one == "bf16" else RecordedLinear(layer, one, counting) for one in chosen.values()}
            parent, _, leaf = name.rpartition(".")
            new = ByStep(made, chosen) if len(made) > 1 else next(iter(made.values()))
            setattr(expert.get_submodule(parent), leaf, new)
