"""Sequence parallelism attached to the experts from outside: tokens over the ranks, heads inside attention (xDiT's USP)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from wan_mlperf.errors import BadInput
from wan_mlperf.experts import CrossAttend, SelfAttend, Split
from wan_mlperf.kernels.attention import Kernel
from wan_mlperf.parallel import xdit
from wan_mlperf.parallel.mesh import Mesh, Shape


class TokenSplit(Split):
    """Each rank of the sequence-parallel group holds one run of the tokens; the last runs are padded with zeros."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._size: int = group.world_size
        self._rank: int = group.rank_in_group

    def scatter(self, tokens: torch.Tensor) -> torch.Tensor:
        count = tokens.shape[1]
        share = -(-count // self._size)
        mine = tokens[:, self._rank * share : (self._rank + 1) * share]
        missing = share - mine.shape[1]
        if missing:
            mine = F.pad(mine, (0, 0) * (tokens.ndim - 2) + (0, missing))
        return mine.contiguous()

    def gather(self, tokens: torch.Tensor, count: int) -> torch.Tensor:
        return self._group.all_gather(tokens.contiguous(), dim=1)[:, :count]


def check(shape: Shape, *, tokens: int) -> None:
    """Raise BadInput where ring attention would see padding: xDiT's ring rotates whole shards and cannot leave it out."""
    ranks = shape.ulysses * shape.ring
    if shape.ring > 1 and tokens % ranks:
        raise BadInput(
            f"mesh.ring {shape.ring}: {tokens} tokens do not divide by Ulysses {shape.ulysses} x ring {shape.ring}; "
            "allowed: a size that divides, or ring 1"
        )


def split(mesh: Mesh) -> Split:
    """Return how this mesh splits the video tokens."""
    if mesh.shape.ulysses * mesh.shape.ring == 1:
        return Split()
    return TokenSplit(importlib.import_module("xfuser.core.distributed").get_sp_group())


def attends(kernels: Mapping[str, Kernel]) -> tuple[SelfAttend, CrossAttend]:
    """Return self- and cross-attention through xDiT with these kernels (see kernels/attention.py)."""
    usp = importlib.import_module("xfuser.model_executor.layers.usp")
    keys = {
        name: xdit.backend_key(kernel.xdit) if kernel.xdit else xdit.register(name, kernel.function)  # type: ignore[arg-type]
        for name, kernel in kernels.items()
    }
    group = importlib.import_module("xfuser.core.distributed").get_sp_group()
    padded_to = group.world_size

    def self_attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: str, tokens: int) -> torch.Tensor:
        # Zero tokens that pad the last shard have keys, too: USP drops them after its exchange.
        kwargs = {"valid_kv_len": tokens} if tokens % padded_to else None
        return usp.USP(query, key, value, backend=keys[kernel], attention_kwargs=kwargs)

    def cross_attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        kwargs = None if bias is None else {"attn_mask": bias}
        return usp.attention(query, key, value, backend=keys["cross"], attention_kwargs=kwargs)

    return self_attend, cross_attend
