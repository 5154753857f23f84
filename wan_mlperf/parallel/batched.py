"""Both branches of guidance on the same ranks as one batch: half as many operations and messages, each for twice the tokens.

On a CPU, where a small model's calls take longer than its products, that is faster; a GPU has enough to do with one branch. Only
cross-attention is made branch by branch, because their texts differ in length. A product of another size may be summed in another
order, so `exact` on one rank runs one branch after the other.

B batch, T tokens of a rank, C channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock as Block

from wan_mlperf.experts import BlockInputs, CrossAttend, SelfAttend, TextKeys, Texts, run_block


class Batched:
    """See the module; `self_attend` as for one branch."""

    summary = "as one batch"

    def __init__(self, self_attend: SelfAttend) -> None:
        self.self_attend = self_attend
        self.run_block = run_block
        self.compiled = False
        self._cross_attends = functools.lru_cache(maxsize=1)(_branch_by_branch)  # the compiler would compile for a new one

    def compile(self, **how: Any) -> None:
        """Compile one block for all layers."""
        self.run_block = torch.compile(run_block, **how)
        self.compiled = True

    def __call__(
        self,
        blocks: Sequence[Block],
        tokens: torch.Tensor,
        texts: Texts,
        inputs: BlockInputs,
        cross_attend: CrossAttend,
    ) -> list[torch.Tensor]:
        """Tokens [B, T, C] -> the same after all blocks, with each of the texts."""
        cross, tokens = self._cross_attends(cross_attend), torch.cat([tokens] * len(texts))
        if self.compiled:  # a graph per number of tokens: with a second one the compiler would make the length dynamic
            torch._dynamo.mark_static(tokens, 1)
        for number, block in enumerate(blocks):
            layer: Any = tuple(text[number] for text in texts)  # which `cross` takes apart
            tokens = self.run_block(block, tokens, layer, inputs, self.self_attend, cross)
        return list(tokens.chunk(len(texts)))


def _branch_by_branch(cross_attend: CrossAttend) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    def attend(query: torch.Tensor, texts: Sequence[TextKeys]) -> torch.Tensor:
        branches = zip(query.chunk(len(texts)), texts, strict=True)
        return torch.cat([cross_attend(its_query, text) for its_query, text in branches])

    return attend
