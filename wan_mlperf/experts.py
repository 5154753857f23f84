"""The two transformers: one forward pass as the denoising loop needs it, from the parts of diffusers' blocks.

A block is `project` (norm, Q, K, V, rotation), self-attention, and `finish` (all that follows). The two pieces let ranks
exchange tokens for heads around attention while the other branch computes (parallel/interleave.py). Bit for bit as in diffusers.

What depends only on the text (keys and values of cross-attention) is computed once per query. What depends only on shapes and
the schedule (rotary tables, modulation of the timesteps) is computed once per process.

Shapes: B batch, T video tokens (of this rank), S text tokens, H heads, D head dim, C = H x D, F h w latent frames, height, width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock as Block
from torch import nn

from wan_mlperf.kernels import padding
from wan_mlperf.kernels.device import OVERLAP
from wan_mlperf.kernels.linear import ByStep, products
from wan_mlperf.kernels.padding import Padding
from wan_mlperf.step_plan import Layers
from wan_mlperf.text_encoder import Embeds

# (query, key, value, kernel name, tokens of all ranks) -> output; tensors are [B, H, T, D].
SelfAttend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, str, int], torch.Tensor]
# (query [B, H, T, D], the layer's text) -> output.
CrossAttend = Callable[[torch.Tensor, "TextKeys"], torch.Tensor]
TABLES = 1024  # timesteps, or sizes, whose tables are kept: the longest schedule has 1,000 steps


class BlockInputs(NamedTuple):
    """The same for all blocks: modulation [1, 6, C], rotary tables [1, T, 1, D / 2], kernel name, tokens of all ranks."""

    modulation: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    kernel: str
    tokens: int


class TextKeys(NamedTuple):
    """One layer's cross-attention keys and values [B, H, S, D]; for trimmed text a bias [B, 1, 1, S] or what to merge in."""

    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None = None
    padding: Padding | None = None


Texts = Sequence[Sequence[TextKeys]]  # per branch of guidance, per layer


class Split:
    """How a rank's share of the video tokens is cut out and put together. One rank has them all; others: split_experts.py."""

    def in_force(self) -> AbstractContextManager[None]:
        """Return the context to run the blocks in: there, attention exchanges tokens for heads over the ranks of this split."""
        return nullcontext()

    def scatter(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, all tokens, ...] -> [B, T, ...]."""
        return tokens

    def gather(self, tokens: torch.Tensor, count: int) -> torch.Tensor:
        """[B, T, ...] -> [B, count, ...]."""
        return tokens


class Together(Protocol):
    """Runs both branches of guidance through the blocks at once: parallel/interleave.py's, or parallel/batched.py's."""

    summary: str  # how, in words

    def compile(self, **how: Any) -> None:
        """Compile its pieces of a block."""

    def __call__(
        self, blocks: Sequence[Block], tokens: torch.Tensor, texts: Texts, inputs: BlockInputs, cross_attend: CrossAttend
    ) -> list[torch.Tensor]:
        """Tokens [B, T, C] -> the same after all blocks, with each of the texts."""


class Expert(nn.Module):
    """One expert, ready to denoise. `load` of pipeline.py makes two."""

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        *,
        split: Split,
        unguided_split: Split | None = None,
        self_attend: SelfAttend,
        cross_attend: CrossAttend,
        together: Together | None = None,
        trim_text: bool = False,
        merge_padding: bool = False,
        round_text: bool = False,
    ) -> None:
        """`together`: how a rank that computes both branches of guidance runs them, if not one after the other.

        `trim_text`: the text's padding becomes one token, weighted by a bias or, with `merge_padding`, merged in afterwards.
        `round_text`: trim to a few fixed lengths.
        """
        super().__init__()
        self.transformer = transformer
        self.split = split
        self.unguided_split = unguided_split or split  # where no rank computes the other branch of guidance
        self.trim_text, self.merge_padding, self.round_text = trim_text, merge_padding, round_text
        self.self_attend, self.cross_attend, self.together = self_attend, cross_attend, together
        self._by_step = [one for one in transformer.modules() if isinstance(one, ByStep)]
        self._modulations: dict[float, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rotary: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self.run_block: Callable[..., torch.Tensor] = run_block  # replaced by its compiled version
        self.compiled = False

    def compile(self, **how: Any) -> None:
        """Compile one block for all layers; `how` goes to torch.compile. Each kernel, format and shape takes seconds at first."""
        # Both experts share the code, and beyond this limit torch would silently run eagerly.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self.run_block = torch.compile(run_block, **(how or {"options": OVERLAP}))
        if self.together is not None:
            self.together.compile(**how)  # pieces without an exchange
        self.compiled = True

    def select(self, layers: Layers) -> None:
        """Switch each layer to its format in a step with these `layers`."""
        for one in self._by_step:
            one.select(layers)

    def text_keys(self, embeds: Embeds) -> list[TextKeys]:
        """Return each layer's cross-attention keys and values, once per query."""
        hidden, full, device = embeds.hidden, embeds.hidden.shape[1], embeds.hidden.device
        merged, count, bias, log_count = self.trim_text and self.merge_padding, full, None, None
        if self.trim_text:
            count = padding.kept(embeds.lengths, full, merged=merged, rounded=self.round_text)
            if merged:
                log_count = padding.log_count(full, count, device)
            else:
                bias = padding.bias(embeds.lengths, full, count, device).to(hidden.dtype)
        text = self.transformer.condition_embedder.text_embedder(hidden[:, : count + merged])
        crossed = [block.attn2 for block in self.transformer.blocks]
        projected = products(text, [layer for attn in crossed for layer in (attn.to_k, attn.to_v)])
        keys = []
        for attn, key, value in zip(crossed, projected[0::2], projected[1::2], strict=True):
            key = attn.norm_k(key).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            value = value.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            if log_count is None:
                keys.append(TextKeys(key, value, bias))
            else:
                last = Padding(key[:, :, -1:], value[:, :, -1:], log_count)
                keys.append(TextKeys(key[:, :, :count], value[:, :, :count], padding=last))
        if self.compiled and self.trim_text:
            _any_length(keys)
        return keys

    def forward(self, latents: torch.Tensor, timestep: float, text: Sequence[TextKeys], kernel: str) -> torch.Tensor:
        """Predict the noise of `latents` [B, channels, F, h, w] at `timestep`; same shape, on every rank."""
        tokens = self.embed(latents, self.split)
        return self.predict(self.run_blocks(tokens, latents, timestep, text, kernel, self.split), latents, timestep, self.split)

    def embed(self, latents: torch.Tensor, split: Split) -> torch.Tensor:
        """Latents [B, channels, F, h, w] -> this rank's tokens [B, T, C]."""
        return split.scatter(self.transformer.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous())

    def run_branches(
        self, tokens: torch.Tensor, latents: torch.Tensor, timestep: float, texts: Texts, kernel: str, split: Split
    ) -> list[torch.Tensor]:
        """Tokens [B, T, C] -> the same after all blocks, with the text of each branch of guidance that this rank computes."""
        if self.together is None or len(texts) == 1:
            return [self.run_blocks(tokens, latents, timestep, text, kernel, split) for text in texts]
        with split.in_force():
            inputs = self._inputs_of(latents, timestep, kernel, split)
            return self.together(self.transformer.blocks[: len(texts[0])], tokens, texts, inputs, self.cross_attend)

    def run_blocks(
        self, tokens: torch.Tensor, latents: torch.Tensor, timestep: float, text: Sequence[TextKeys], kernel: str, split: Split
    ) -> torch.Tensor:
        """Tokens [B, T, C] -> the same after all blocks. Only the shape of `latents` is used."""
        inputs = self._inputs_of(latents, timestep, kernel, split)
        if self.compiled:  # a graph per number of tokens: with a second one the compiler would make the length dynamic
            torch._dynamo.mark_static(tokens, 1)
        with split.in_force():
            # To warm up (denoise.py), `text` has only the first block's keys.
            for block, keys in zip(self.transformer.blocks[: len(text)], text, strict=True):
                tokens = self.run_block(block, tokens, keys, inputs, self.self_attend, self.cross_attend)
        return tokens

    def _inputs_of(self, latents: torch.Tensor, timestep: float, kernel: str, split: Split) -> BlockInputs:
        _, modulation = self._modulation_of(timestep, latents)
        return BlockInputs(modulation, *self._rotary_of(latents, split), kernel, math.prod(self._grid(latents)))

    def predict(self, tokens: torch.Tensor, latents: torch.Tensor, timestep: float, split: Split) -> torch.Tensor:
        """Tokens [B, T, C] after the blocks -> noise [B, channels, F, h, w] on every rank. Only the shape of `latents` counts."""
        model, grid = self.transformer, self._grid(latents)
        temb, _ = self._modulation_of(timestep, latents)
        shift, scale = (model.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        tokens = (model.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens)
        hidden = split.gather(model.proj_out(tokens), math.prod(grid))
        hidden = hidden.reshape(len(latents), *grid, *model.config.patch_size, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return hidden.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _grid(self, latents: torch.Tensor) -> list[int]:
        """Number of tokens along frames, height and width."""
        return [length // side for length, side in zip(latents.shape[2:], self.transformer.config.patch_size, strict=True)]

    def _modulation_of(self, timestep: float, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (temb [1, C], modulation [1, 6, C]) of a timestep. They depend only on the schedule, never on a query."""
        if timestep not in self._modulations:
            _make_room(self._modulations)
            embedder = self.transformer.condition_embedder
            time = embedder.timesteps_proj(torch.tensor([timestep], device=latents.device))
            time = time.to(next(iter(embedder.time_embedder.parameters())).dtype)
            temb = embedder.time_embedder(time).to(latents.dtype)
            self._modulations[timestep] = temb, embedder.time_proj(embedder.act_fn(temb)).unflatten(1, (6, -1))
        return self._modulations[timestep]

    def _rotary_of(self, latents: torch.Tensor, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's rotary tables. diffusers stores each value twice, once per element of a pair."""
        key = (split, *latents.shape[2:])
        if key not in self._rotary:
            _make_room(self._rotary)
            cos, sin = self.transformer.rope(latents)
            self._rotary[key] = split.scatter(cos)[..., 0::2].contiguous(), split.scatter(sin)[..., 1::2].contiguous()
            for table in self._rotary[key]:
                torch._dynamo.mark_static(table, 1)
        return self._rotary[key]


def _make_room(kept: dict[Any, Any]) -> None:
    """Drop the kept tables when there are too many: a server takes any size and number of steps."""
    if len(kept) >= TABLES:
        kept.clear()


def run_block(
    block: Block, hidden: torch.Tensor, text: TextKeys, inputs: BlockInputs, self_attend: SelfAttend, cross_attend: CrossAttend
) -> torch.Tensor:
    """Tokens [B, T, C] -> the same after a block."""
    # Nothing here has a name that would keep it while the rest runs: at 720p each of Q, K and V takes 0.8 GB on a lone GPU.
    return finish(
        block, hidden, self_attend(*project(block, hidden, inputs), inputs.kernel, inputs.tokens), text, inputs, cross_attend
    )


def project(block: Block, hidden: torch.Tensor, inputs: BlockInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [B, T, C] -> Q, K and V [B, H, T, D] of a block's self-attention."""
    attn, (shift, scale) = block.attn1, _modulation(block, inputs)[:2]
    hidden = (block.norm1(hidden.float()) * (1 + scale) + shift).type_as(hidden)
    query, key, value = products(hidden, (attn.to_q, attn.to_k, attn.to_v))
    del hidden
    query, key = attn.norm_q(query).unflatten(2, (attn.heads, -1)), attn.norm_k(key).unflatten(2, (attn.heads, -1))
    query, key, value = _rotate(query, inputs), _rotate(key, inputs), value.unflatten(2, (attn.heads, -1))
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def finish(
    block: Block, hidden: torch.Tensor, attended: torch.Tensor, text: TextKeys, inputs: BlockInputs, cross_attend: CrossAttend
) -> torch.Tensor:
    """Tokens [B, T, C] before a block, and its self-attention's output [B, H, T, D] -> tokens after the block."""
    _, _, gate, shift, scale, last_gate = _modulation(block, inputs)
    attended = block.attn1.to_out[0](attended.transpose(1, 2).flatten(2, 3).type_as(hidden))
    hidden = (hidden.float() + attended * gate).type_as(hidden)
    del attended  # what is done with makes room, as for Q, K and V

    crossed, attn = block.norm2(hidden.float()).type_as(hidden), block.attn2
    query = attn.norm_q(attn.to_q(crossed)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
    crossed = cross_attend(query, text).transpose(1, 2).flatten(2, 3).type_as(hidden)
    hidden = hidden + attn.to_out[0](crossed)
    del query, crossed

    fed = block.ffn((block.norm3(hidden.float()) * (1 + scale) + shift).type_as(hidden))
    return (hidden.float() + fed.float() * last_gate).type_as(hidden)


def _modulation(block: Block, inputs: BlockInputs) -> tuple[torch.Tensor, ...]:
    """Shift, scale and gate [1, 1, C] of self-attention, then of the feed-forward layers."""
    return (block.scale_shift_table + inputs.modulation.float()).chunk(6, dim=1)


def _rotate(hidden: torch.Tensor, inputs: BlockInputs) -> torch.Tensor:
    """Rotate the pairs of [B, T, H, D] by the tables, as diffusers' WanAttnProcessor does, bit for bit."""
    first, second = hidden.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = inputs.cos, inputs.sin
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2).type_as(hidden)


def _any_length(keys: Sequence[TextKeys]) -> None:
    """Make the text's length dynamic for the compiler: else the first prompt of another length would compile during its query."""
    for key, value, bias, _ in keys:
        for tensor, dim in ((key, 2), (value, 2), (bias, 3)):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
