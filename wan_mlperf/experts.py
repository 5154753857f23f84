"""The two transformers: one forward pass as the denoising loop needs it, around diffusers' own blocks.

diffusers' block hands its second argument (there: the text's embeddings) through to the processor of its cross-attention, and its
fourth (there: the rotary tables) to that of its self-attention, without looking inside. We replace both processors, so we pass
what ours need: `TextKeys` as the second argument, `SelfAttentionInputs` as the fourth.

What depends only on the text (keys and values of cross-attention) is computed once per query. What depends only on shapes and
the schedule (rotary tables, modulation of the timesteps) is computed once per process. The arithmetic of a block is diffusers'.

Shapes: B batch, T video tokens (of this rank), S text tokens, H heads, D head dim, C = H x D, F h w latent frames, height, width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn

from wan_mlperf.kernels import padding
from wan_mlperf.kernels.linear import products
from wan_mlperf.kernels.padding import Padding
from wan_mlperf.text_encoder import Embeds

# (query, key, value, kernel name, tokens of all ranks) -> output; tensors are [B, H, T, D].
SelfAttend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, str, int], torch.Tensor]
# (query [B, H, T, D], the layer's text) -> output.
CrossAttend = Callable[[torch.Tensor, "TextKeys"], torch.Tensor]

TABLES = 1024  # timesteps, or sizes, whose tables are kept: the longest schedule has 1,000 steps


class SelfAttentionInputs(NamedTuple):
    """What self-attention needs besides its tokens: rotary tables [1, T, 1, D / 2], kernel name, tokens of all ranks."""

    cos: torch.Tensor
    sin: torch.Tensor
    kernel: str
    tokens: int


class TextKeys(NamedTuple):
    """One layer's cross-attention keys and values [B, H, S, D]; of trimmed text also its padding (kernels/padding.py).

    That is the bias of its logits [B, 1, 1, S], or what is to be merged in.
    """

    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None = None
    padding: Padding | None = None


class Split:
    """How a rank's share of the video tokens is cut out and put together: here, one rank has them all.

    `parallel/split_experts.py` gives the versions for several ranks.
    """

    def in_force(self) -> AbstractContextManager[None]:
        """While the blocks run, attention exchanges tokens and heads over the ranks of this split."""
        return nullcontext()

    def scatter(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, all tokens, ...] -> [B, T, ...]."""
        return tokens

    def gather(self, tokens: torch.Tensor, count: int) -> torch.Tensor:
        """[B, T, ...] -> [B, count, ...]."""
        return tokens


class SelfAttention:
    """Attention processor of `attn1`: diffusers' projections, norm and rotation, then the kernel of the step."""

    def __init__(self, attend: SelfAttend) -> None:
        self.attend = attend

    def __call__(
        self, attn: WanAttention, hidden: torch.Tensor, _text: None, _mask: None, inputs: SelfAttentionInputs
    ) -> torch.Tensor:
        query, key, value = products(hidden, (attn.to_q, attn.to_k, attn.to_v))
        query = attn.norm_q(query).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(key).unflatten(2, (attn.heads, -1))
        value = value.unflatten(2, (attn.heads, -1))
        query, key = _rotate(query, inputs), _rotate(key, inputs)
        out = self.attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), inputs.kernel, inputs.tokens)
        return attn.to_out[0](out.transpose(1, 2).flatten(2, 3).type_as(hidden))


class CrossAttention:
    """Attention processor of `attn2`. The text's keys and values are already computed."""

    def __init__(self, attend: CrossAttend) -> None:
        self.attend = attend

    def __call__(self, attn: WanAttention, hidden: torch.Tensor, text: TextKeys, _mask: None, _rotary: None) -> torch.Tensor:
        query = attn.norm_q(attn.to_q(hidden)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        out = self.attend(query, text)
        return attn.to_out[0](out.transpose(1, 2).flatten(2, 3).type_as(hidden))


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
        trim_text: bool = False,
        merge_padding: bool = False,
        round_text: bool = False,
    ) -> None:
        """`trim_text`: the text's padding as one token, by a bias or, with `merge_padding`, merged in.

        `round_text`: trim to few different lengths.
        """
        super().__init__()
        self.transformer = transformer
        self.split = split
        self.unguided_split = unguided_split or split  # where no rank computes the other branch of guidance
        self.trim_text, self.merge_padding, self.round_text = trim_text, merge_padding, round_text
        for block in transformer.blocks:
            block.attn1.processor = SelfAttention(self_attend)
            block.attn2.processor = CrossAttention(cross_attend)
        self._modulations: dict[float, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rotary: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self.run_block: Callable[..., torch.Tensor] = _run_block  # replaced by its compiled version
        self.compiled = False

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile one block for all layers. The first call with each kernel, GEMM format and shape then takes seconds."""
        # Both experts share the code, and beyond this limit torch would silently run eagerly.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self.run_block = torch.compile(_run_block, *args, **kwargs)
        self.compiled = True

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

    def run_blocks(
        self, tokens: torch.Tensor, latents: torch.Tensor, timestep: float, text: Sequence[TextKeys], kernel: str, split: Split
    ) -> torch.Tensor:
        """Tokens [B, T, C] -> the same after all blocks. Only the shape of `latents` is used."""
        inputs = SelfAttentionInputs(*self._rotary_of(latents, split), kernel, math.prod(self._grid(latents)))
        _, modulation = self._modulation_of(timestep, latents)
        if self.compiled:  # a graph per number of tokens: with a second one the compiler would make the length dynamic
            torch._dynamo.mark_static(tokens, 1)
        with split.in_force():
            for block, keys in zip(self.transformer.blocks, text, strict=True):
                tokens = self.run_block(block, tokens, keys, modulation, inputs)
        return tokens

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
    """A server that takes any size and number of steps must not keep the tables of all it ever saw."""
    if len(kept) >= TABLES:
        kept.clear()


def _run_block(
    block: nn.Module, hidden: torch.Tensor, keys: TextKeys, modulation: torch.Tensor, inputs: SelfAttentionInputs
) -> torch.Tensor:
    out: torch.Tensor = block(hidden, keys, modulation, inputs)
    return out


def _rotate(hidden: torch.Tensor, inputs: SelfAttentionInputs) -> torch.Tensor:
    """Rotate the pairs of [B, T, H, D] by the tables, as diffusers' WanAttnProcessor does, bit for bit."""
    first, second = hidden.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = inputs.cos, inputs.sin
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2).type_as(hidden)


def _any_length(keys: Sequence[TextKeys]) -> None:
    """Make the text's length dynamic for the compiler: else the first prompt of another length would compile in its query."""
    for key, value, bias, _ in keys:
        torch._dynamo.maybe_mark_dynamic(key, 2)
        torch._dynamo.maybe_mark_dynamic(value, 2)
        if bias is not None:
            torch._dynamo.maybe_mark_dynamic(bias, 3)
