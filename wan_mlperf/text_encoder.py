"""Prompts -> UMT5 embeddings, as diffusers' WanPipeline makes them.

Shapes: B prompts, S tokens (512), C text channels (4,096 in Wan2.2).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import PreTrainedTokenizerBase

from wan_mlperf.errors import BadInput
from wan_mlperf.inputs.paths import utf8

MAX_TOKENS = 512


@dataclass(frozen=True)
class Embeds:
    """`hidden` [B, S, C]: the first `lengths[b]` tokens belong to prompt b, the rest are zeros."""

    hidden: torch.Tensor
    lengths: tuple[int, ...]


class TextEncoder:
    """Encodes prompts with the checkpoint's tokenizer and UMT5 encoder. Keeps nothing of a query."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module, dtype: torch.dtype) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.dtype = dtype  # what the experts compute in

    def encode(self, prompts: Sequence[str]) -> Embeds:
        """Return the embeddings of `prompts`, zero-padded to 512 tokens."""
        inputs = self.tokenizer(
            [prompt_clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=MAX_TOKENS,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        device = next(self.model.parameters()).device
        mask = inputs.attention_mask
        hidden = self.model(inputs.input_ids.to(device), mask.to(device)).last_hidden_state
        hidden = hidden.masked_fill((mask == 0).unsqueeze(-1).to(device), 0.0)
        return Embeds(hidden.to(self.dtype), tuple(mask.sum(dim=1).tolist()))


def _is_invisible(character: str) -> bool:
    """True for spaces, control and format characters, and letters without a shape: Hangul fillers, the blank Braille cell."""
    return unicodedata.category(character) in ("Cc", "Cf", "Zs", "Zl", "Zp") or character in "\u115f\u1160\u3164\uffa0\u2800"


def check_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, what: str = "prompt", may_be_empty: bool = False) -> None:
    """Raise BadInput for an empty prompt, or for one that the tokenizer would cut. The error says what would be cut.

    The prompt is first cleaned as in diffusers, so `&nbsp;` is a space. A negative prompt may be empty.
    """
    if not isinstance(prompt, str):
        raise BadInput(f"{what}: {prompt!r} is a {type(prompt).__name__}; allowed: some text")
    utf8(prompt, what=what)
    cleaned = prompt_clean(prompt)
    if all(_is_invisible(one) for one in cleaned) and not may_be_empty:
        left = ", once entities and what nobody can see are left out" if prompt.strip() else ""
        raise BadInput(f"{what}: {prompt!r} is empty{left}; allowed: some text")
    ids = tokenizer(cleaned, add_special_tokens=True).input_ids
    if len(ids) > MAX_TOKENS:
        # One token fewer, because the end-of-text token is kept.
        cut = tokenizer.decode(ids[MAX_TOKENS - 1 : -1])
        cut = cut if len(cut) <= 120 else cut[:117] + "..."
        raise BadInput(f"{what}: {len(ids)} tokens; allowed: at most {MAX_TOKENS}; this part would be cut: {cut!r}")
