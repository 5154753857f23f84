"""A CPU's linear layers with weights in oneDNN's order give what PyTorch's own give, with and without the activation."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import nn

from wan_mlperf.kernels import linear, packed
from wan_mlperf.kernels.linear import Mxfp4Linear
from wan_mlperf.kernels.packed import PackedLinear


def block(dtype: torch.dtype) -> nn.ModuleDict:
    """A linear layer and a feed-forward layer, as in diffusers' block."""
    torch.manual_seed(0)
    layers = {"to_q": nn.Linear(64, 96, bias=False), "ffn": FeedForward(64, inner_dim=160, activation_fn="gelu-approximate")}
    return nn.ModuleDict(layers).to(dtype).requires_grad_(False).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("shape", [(1, 7, 64), (2, 80, 64)])
def test_they_give_what_pytorchs_layers_give(
    dtype: torch.dtype, tolerance: float, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "compute_dtype", lambda dtype, _device: dtype)  # also on a CPU whose bf16 is slow
    plain, hidden = block(dtype), torch.randn(shape).to(dtype)
    fast = copy.deepcopy(plain)
    packed.pack(fast)
    kinds = [type(fast["to_q"]), *(type(one) for one in fast.get_submodule("ffn.net").children())]
    assert kinds == [PackedLinear, PackedLinear, nn.Dropout, PackedLinear]
    for name in ("to_q", "ffn"):
        expected, made = plain[name](hidden), fast[name](hidden)
        assert made.shape == expected.shape and made.dtype == dtype
        assert float((made - expected).float().norm() / expected.float().norm()) < tolerance
    outs = linear.products(hidden, [fast["to_q"], fast["to_q"]])
    assert len(outs) == 2 and torch.equal(outs[0], fast["to_q"](hidden)) and torch.equal(*outs)


def test_the_memory_is_that_of_the_weights() -> None:
    layers = block(torch.float32)
    before = sum(one.nbytes for one in layers.parameters())
    packed.pack(layers)
    assert sum(one.nbytes for one in [*layers.parameters(), *layers.buffers()]) == before


def test_what_another_layer_multiplies_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised layers, those that must multiply in another dtype, and all of them without oneDNN."""
    quantised = nn.ModuleDict({"to_q": Mxfp4Linear(nn.Linear(64, 64))})
    packed.pack(quantised)
    assert type(quantised["to_q"]) is Mxfp4Linear
    widened = block(torch.bfloat16)
    monkeypatch.setattr(packed, "compute_dtype", lambda _dtype, _device: torch.float32)
    packed.pack(widened)
    assert not any(isinstance(one, PackedLinear) for one in widened.modules())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    without = block(torch.float32)
    packed.pack(without)
    assert not any(isinstance(one, PackedLinear) for one in without.modules())
