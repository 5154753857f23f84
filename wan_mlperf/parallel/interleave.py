"""Both branches of guidance on the same ranks, through the blocks in turns: while one exchanges, the other computes.

A block is three pieces with an all-to-all after the first and the second: project and pack Q, K and V; attention; all that
follows, with the next block's projection. The pieces of the branches alternate:

    A: project, send    B: project, send    A: attend, send    B: attend, send    A: finish, project, send    B: ...

so that a piece of the other branch runs between the start of an exchange and the wait for it. Bytes and results are those of one
branch after the other, bit for bit, in half as many messages (Q, K and V in one). The pieces are compiled, and the exchange is
between them: no graph has a collective in it, and none breaks at one.

B batch, H heads, T tokens of a rank, D head dim, U Ulysses degree.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.transformers.transformer_wan import WanTransformerBlock as Block

from wan_mlperf.errors import BadInput
from wan_mlperf.experts import BlockInputs, CrossAttend, TextKeys, finish, project
from wan_mlperf.kernels import e4m3
from wan_mlperf.kernels.device import Device
from wan_mlperf.parallel.mesh import Shape
from wan_mlperf.parallel.xdit import Key
from wan_mlperf.recipe import MeshRecipe

Wait = Callable[[], torch.Tensor]
Piece = Callable[..., Any]


def chosen(mesh: MeshRecipe, shape: Shape, device: Device) -> bool:
    """Do the branches take turns? `auto` says yes on GPUs with Ulysses where possible. Raises BadInput if `true` is impossible.

    A CPU has nothing that would send while it computes: gloo's threads need the cores that the ranks compute on.
    """
    problem = f"CFG {shape.cfg}: each rank computes one branch" if shape.cfg > 1 else ""
    if shape.ring > 1:
        problem = f"ring {shape.ring}, which sends within attention"
    if mesh.interleave is True and problem:
        raise BadInput(f"mesh.interleave true: impossible with {problem}; allowed: auto, false, or mesh.cfg 1 and mesh.ring 1")
    if mesh.interleave == "auto":
        return device.is_gpu and shape.ulysses > 1 and not problem
    return mesh.interleave


class Interleaved:
    """Runs both branches through the blocks in turns (see the module). `group` is the Ulysses group.

    `attend(query, key, value, kernel)` is attention on a rank's own heads. `fp8`: Q, K and V cross as E4M3 (kernels/e4m3.py).
    """

    summary = "in turns: while one exchanges, the other computes"

    def __init__(self, group: dist.ProcessGroup, attend: Callable[..., torch.Tensor], *, fp8: bool = False) -> None:
        self.group, self.attend, self.fp8, self.size = group, attend, fp8, dist.get_world_size(group)
        self.first: Piece = _first
        self.middle: Piece = _middle
        self.turn: Piece = _turn
        self.last: Piece = _last
        self.compiled = False

    def compile(self, **how: Any) -> None:
        """Compile the pieces: one graph each for all blocks and both branches, for attention one per kernel."""
        pieces: list[Piece] = [torch.compile(piece, **how) for piece in (_first, _middle, _turn, _last)]
        self.first, self.middle, self.turn, self.last = pieces
        self.compiled = True

    def __call__(
        self,
        blocks: Sequence[Block],
        tokens: torch.Tensor,
        texts: Sequence[Sequence[TextKeys]],
        inputs: BlockInputs,
        cross_attend: CrossAttend,
    ) -> list[torch.Tensor]:
        """Tokens [B, T, C] -> the tokens after all blocks, once for each of the texts."""
        hidden = [self._static(tokens)] * len(texts)
        under_way = [self.start(self.first(blocks[0], tokens, inputs, self.size, self.fp8)) for tokens in hidden]
        for number, block in enumerate(blocks):
            arrived = (self._static(wait()) for wait in under_way)
            dtype = tokens.dtype if self.fp8 else None
            under_way = [self.start(self.middle(one, self.attend, inputs.kernel, inputs.tokens, dtype)) for one in arrived]
            for branch, wait in enumerate(under_way):
                piece = hidden[branch], self._static(wait()), texts[branch][number], inputs, cross_attend
                if number + 1 == len(blocks):
                    hidden[branch] = self.last(block, *piece)
                else:
                    after, packed = self.turn(block, blocks[number + 1], *piece, self.size, self.fp8)
                    hidden[branch], under_way[branch] = self._static(after), self.start(packed)
        return hidden

    def start(self, packed: torch.Tensor) -> Wait:
        """Send each rank its part [U, ...] and return; call the result to wait for theirs."""
        if self.size == 1:
            return lambda: packed
        received = torch.empty_like(packed)
        work = dist.all_to_all_single(received, packed, group=self.group, async_op=True)
        return functools.partial(_arrived, work, packed, received)

    def _static(self, tensor: torch.Tensor) -> torch.Tensor:
        """If compiled, have one graph per number of tokens: at a second number the compiler would make the length dynamic."""
        if self.compiled:
            torch._dynamo.mark_static(tensor)
        return tensor


def _arrived(work: dist.Work, _packed: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
    """Wait for an exchange, whose tensors are kept alive until then. On a GPU the stream waits, not the host."""
    work.wait()
    return received


def _first(block: Block, hidden: torch.Tensor, inputs: BlockInputs, size: int, fp8: bool) -> torch.Tensor:
    """Tokens [B, T, C] -> Q, K and V for each rank, [U, 3, B, H / U, T, D], or with `fp8` as packed bytes, T + 1 rows."""
    projected = [e4m3.pack(one) if fp8 else one for one in project(block, hidden, inputs)]
    return torch.stack([one.unflatten(1, (size, -1)).transpose(0, 1) for one in projected], dim=1)


def _middle(
    arrived: torch.Tensor, attend: Callable[..., torch.Tensor], kernel: str, tokens: int, packed: torch.dtype | None
) -> torch.Tensor:
    """Q, K and V [U, 3, B, H / U, T, D] of each rank's tokens -> attention's output for each rank, [U, B, H / U, T, D].

    `packed`: if given, they arrive as bytes of E4M3, to be unpacked to this dtype.
    """
    by_head = arrived.permute(1, 2, 3, 0, 4, 5)
    if packed is not None:
        by_head = e4m3.unpack(by_head.contiguous(), packed)
    query, key, value = by_head.flatten(3, 4).unbind(0)
    # The zero tokens that pad the last shard have keys, too.
    out = attend(query, key[:, :, :tokens], value[:, :, :tokens], kernel)
    return out.unflatten(2, (len(arrived), -1)).permute(2, 0, 1, 3, 4).contiguous()


def _last(
    block: Block, hidden: torch.Tensor, arrived: torch.Tensor, text: TextKeys, inputs: BlockInputs, cross_attend: CrossAttend
) -> torch.Tensor:
    """Tokens [B, T, C] before a block, and the output [U, B, H / U, T, D] of each rank's heads -> tokens after the block."""
    return finish(block, hidden, arrived.transpose(0, 1).flatten(1, 2), text, inputs, cross_attend)


def _turn(
    block: Block,
    following: Block,
    hidden: torch.Tensor,
    arrived: torch.Tensor,
    text: TextKeys,
    inputs: BlockInputs,
    cross_attend: CrossAttend,
    size: int,
    fp8: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The end of a block and the beginning of the next: tokens, and what `_first` returns."""
    hidden = _last(block, hidden, arrived, text, inputs, cross_attend)
    return hidden, _first(following, hidden, inputs, size, fp8)


def on_own_heads(keys: Mapping[str, Key], rehearsed_ranks: int = 1) -> Callable[..., torch.Tensor]:
    """Return attention through xDiT without any exchange; `keys` is recipe name -> key of its registry.

    With `rehearsed_ranks` above 1 it rounds Q, K and V as if so many ranks had exchanged them as E4M3.
    """
    usp = importlib.import_module("xfuser.model_executor.layers.usp")

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: str) -> torch.Tensor:
        if rehearsed_ranks > 1:
            query, key, value = (e4m3.as_sent(one, rehearsed_ranks) for one in (query, key, value))
        out: torch.Tensor = usp.attention(query, key, value, backend=keys[kernel])
        return out

    return attend
