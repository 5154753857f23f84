"""Sequence parallelism, attached to the experts from outside: ranks share the tokens, and in attention the heads (xDiT's USP)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F

from wan_mlperf.errors import BadInput
from wan_mlperf.experts import CrossAttend, SelfAttend, Split, TextKeys, Together
from wan_mlperf.kernels import e4m3, padding
from wan_mlperf.kernels.attention import Kernel
from wan_mlperf.kernels.device import Device
from wan_mlperf.parallel import batched, fp8_exchange, interleave, xdit, xdit_groups
from wan_mlperf.parallel.mesh import Mesh, Shape
from wan_mlperf.parallel.xdit import Key
from wan_mlperf.recipe import ExchangeName, Recipe


class TokenSplit(Split):
    """Each rank of a sequence-parallel group holds a contiguous share of the tokens; the last shares are padded with zeros."""

    def __init__(self, groups: xdit_groups.SequenceGroups) -> None:
        self._groups = groups
        self._group = groups.coordinator
        self._size: int = self._group.world_size
        self._rank: int = self._group.rank_in_group

    def in_force(self) -> AbstractContextManager[None]:
        return xdit_groups.sequence_over(self._groups)

    def scatter(self, tokens: torch.Tensor) -> torch.Tensor:
        count = tokens.shape[1]
        share = -(-count // self._size)
        mine = tokens[:, self._rank * share : (self._rank + 1) * share]
        missing = share - mine.shape[1]
        if missing:
            mine = F.pad(mine, (0, 0) * (tokens.ndim - 2) + (0, missing))
        # One sample's share is contiguous already, but has the stride of all tokens, which costs the compiler a separate graph.
        return mine.clone(memory_format=torch.contiguous_format)

    def gather(self, tokens: torch.Tensor, count: int) -> torch.Tensor:
        return self._group.all_gather(tokens.contiguous(), dim=1)[:, :count]


def check(shape: Shape, *, tokens: int, heads: int, unguided: bool) -> None:
    """Raise BadInput for tokens or heads that the ranks cannot share. `unguided`: some steps run without guidance.

    Ring attention must not see padding: xDiT's ring rotates whole shards and cannot drop it.
    """
    widened = unguided and shape.cfg == 2
    ulysses = shape.ulysses * (2 if widened else 1)
    if widened and heads % ulysses:
        raise BadInput(
            f"guidance: a step without it runs on all ranks of a replica as Ulysses {ulysses}, by which {heads} heads are "
            f"not divisible; allowed: guidance in every step, or mesh.cfg 1"
        )
    if shape.ring > 1 and tokens % (ulysses * shape.ring):
        raise BadInput(
            f"mesh.ring {shape.ring}: {tokens} tokens are not divisible by Ulysses {ulysses} x ring {shape.ring}; "
            "allowed: a size that divides, or ring 1"
        )


def split(mesh: Mesh) -> Split:
    """Return how this mesh splits the video tokens."""
    if mesh.shape.ulysses * mesh.shape.ring == 1:
        return Split()
    return TokenSplit(xdit_groups.sequence_groups())


def unguided_split(mesh: Mesh) -> Split | None:
    """Return how it splits them in steps without guidance: over both branches' ranks, so that none is idle; None if as always."""
    return None if mesh.unguided_groups is None else TokenSplit(mesh.unguided_groups)


def together(
    kernels: Mapping[str, Kernel], recipe: Recipe, shape: Shape, device: Device, *, rehearsed_ranks: int = 1
) -> Together | None:
    """Return how both branches of guidance take turns through the blocks; None if they run one after the other.

    In turns where `mesh.interleave` says so; as one batch on a CPU, unless it is false or the result must be bit for bit
    diffusers'. `rehearsed_ranks` as for `attends`.
    """
    if not interleave.chosen(recipe.mesh, shape, device):
        one_by_one = recipe.mesh.interleave is False or recipe.is_bitwise(shape.per_replica)
        if device.is_gpu or shape.cfg > 1 or one_by_one:
            return None
        self_attend, _ = attends(kernels, exchange=recipe.exchange, rehearsed_ranks=rehearsed_ranks)
        return batched.Batched(self_attend)
    fp8, alone = recipe.exchange == "fp8", shape.ulysses == 1
    attend = interleave.on_own_heads(_keys(kernels), rehearsed_ranks if fp8 and alone else 1)
    return interleave.Interleaved(xdit_groups.sequence_groups().ulysses, attend, fp8=fp8 and not alone)


def _keys(kernels: Mapping[str, Kernel]) -> dict[str, Key]:
    """Recipe name -> key of xDiT's attention registry."""
    return {
        name: xdit.backend_key(kernel.xdit) if kernel.xdit else xdit.register(name, kernel.function)  # type: ignore[arg-type]
        for name, kernel in kernels.items()
    }


def attends(
    kernels: Mapping[str, Kernel], *, exchange: ExchangeName = "bf16", rehearsed_ranks: int = 1
) -> tuple[SelfAttend, CrossAttend]:
    """Return self- and cross-attention through xDiT with these kernels (see kernels/attention.py).

    `exchange` is the recipe's. With `rehearsed_ranks` above 1, a rank that has all tokens rounds Q, K and V as if that many ranks
    had exchanged them.
    """
    usp = importlib.import_module("xfuser.model_executor.layers.usp")
    keys = _keys(kernels)
    distributed = importlib.import_module("xfuser.core.distributed")

    def self_attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: str, tokens: int) -> torch.Tensor:
        world = distributed.get_sequence_parallel_world_size()
        if exchange == "fp8" and world > 1:
            return fp8_exchange.attend(usp, query, key, value, backend=keys[kernel], tokens=tokens)
        if exchange == "fp8" and rehearsed_ranks > 1:
            query, key, value = (e4m3.as_sent(one, rehearsed_ranks) for one in (query, key, value))
        # The zero tokens that pad the last shard have keys, too. USP drops them after its exchange.
        kwargs = {"valid_kv_len": tokens} if tokens % world else None
        return usp.USP(query, key, value, backend=keys[kernel], attention_kwargs=kwargs)

    cross = kernels["cross"]
    function = xdit.attention_function(keys["cross"])  # not in the call: an import there would split the compiled block

    def cross_attend(query: torch.Tensor, text: TextKeys) -> torch.Tensor:
        if text.padding is not None:
            assert cross.lse, f"{cross} gives no log-sum-exp"
            out, lse = function(query, text.key, text.value, dropout_p=0.0, is_causal=False)
            return padding.merge(out, lse, query, text.padding)
        # xDiT's other backends silently ignore a bias.
        assert text.bias is None or cross.bias, f"{cross} reads no bias"
        kwargs = None if text.bias is None else {"attn_mask": text.bias}
        return usp.attention(query, text.key, text.value, backend=keys["cross"], attention_kwargs=kwargs)

    return self_attend, cross_attend
