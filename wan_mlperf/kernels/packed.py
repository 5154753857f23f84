"""Linear layers of an expert's blocks on a CPU, with weights that oneDNN ordered once when they were loaded.

PyTorch's own linear layer has the weights reordered in every call: with the few tokens of a small model that is a third of the
call. oneDNN also applies the feed-forward layers' GELU to a result while it is in the cache. Sums are made in another order than
PyTorch's, so `exact` does not use this. torch.compile cannot trace through tensors of oneDNN, so neither do compiled experts.

Shapes: M tokens, K input features, N output features.
"""

from __future__ import annotations

import torch
from diffusers.models.activations import GELU
from torch import nn

from wan_mlperf.kernels.linear import compute_dtype


class PackedLinear(nn.Module):
    """A linear layer with its activation, if any: "none", or "gelu" as approximated by tanh."""

    weight: torch.Tensor  # oneDNN's, [N, K]

    def __init__(self, layer: nn.Linear, activation: str = "none") -> None:
        super().__init__()
        self.in_features, self.out_features, self.activation = layer.in_features, layer.out_features, activation
        self.bias = layer.bias
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach()))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            hidden, self.weight, self.bias, self.activation, [], "tanh" if self.activation == "gelu" else ""
        )
        return out


def pack(model: nn.Module) -> None:
    """Replace the plain linear layers inside `model` whose dtype this CPU multiplies in; elsewhere it changes nothing."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, GELU) and layer.approximate == "tanh" and _fits(layer.proj):
                setattr(parent, name, PackedLinear(layer.proj, "gelu"))
            elif type(layer) is nn.Linear and not isinstance(parent, GELU) and _fits(layer):
                setattr(parent, name, PackedLinear(layer))


def _fits(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or layer.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    dtype = layer.weight.dtype
    return dtype in (torch.float32, torch.bfloat16) and compute_dtype(dtype, layer.weight.device) == dtype
