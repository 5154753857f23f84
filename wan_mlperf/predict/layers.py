"""Quantised linear layers as records: packed weights of the right size, and a count of each call instead of a product."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
from torch import nn

from wan_mlperf.kernels.gemm import BLOCK
from wan_mlperf.predict.counting import Counting


class RecordedLinear(nn.Module):
    """A linear layer in a format (fp8: E4M3 and a scale per row; mxfp4: E2M1 and a scale per 32 values) that only counts."""

    def __init__(self, layer: nn.Linear, form: str, counting: Counting) -> None:
        super().__init__()
        outputs, inputs = layer.weight.shape
        self.in_features, self.out_features = inputs, outputs
        self.bias = layer.bias
        sizes = {"fp8": (inputs + 4,), "mxfp4": (inputs // 2 + inputs // BLOCK,)}[form]
        self.register_buffer("packed", torch.empty(outputs, *sizes, dtype=torch.uint8, device=layer.weight.device))
        self.packed: torch.Tensor
        self._name, self._counting, self._dtype = f"gemm {form}", counting, layer.weight.dtype

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        rows = hidden.numel() // self.in_features
        out = torch.empty(*hidden.shape[:-1], self.out_features, dtype=self._dtype, device=hidden.device)
        flops = 2.0 * rows * self.in_features * self.out_features
        shapes = f"{rows} x {self.in_features} x {self.out_features}"
        self._counting.record(self._name, flops, (hidden, self.packed), (out,), shapes)
        return out


def convert(expert: nn.Module, form: str, keep: Sequence[tuple[str, str]], counting: Counting) -> None:
    """Replace the linear layers of an expert's blocks by records of their format, as kernels/gemm.py's `convert` chooses it."""
    for name, layer in list(expert.named_modules()):
        if name.startswith("blocks.") and isinstance(layer, nn.Linear):
            chosen = next((kept for pattern, kept in keep if fnmatch.fnmatch(name, pattern)), form)
            if chosen != "bf16":
                parent, _, leaf = name.rpartition(".")
                setattr(expert.get_submodule(parent), leaf, RecordedLinear(layer, chosen, counting))
