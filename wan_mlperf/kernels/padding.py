"""The text's padding tokens in cross-attention, which are all equal: n of them weigh as one whose logit is greater by log n.

Either the last one kept carries that as a bias, which only PyTorch's own attention reads; or a kernel that returns its
log-sum-exp sees only the prompt's own tokens, and the padding token is merged in afterwards. Both give the result of all tokens,
except for rounding.

Shapes: B batch, H heads, T video tokens, S text tokens kept, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

# Text lengths that a GPU sees: more padding tokens cost little, while a new length would plan or compile kernels in a query.
LENGTHS = (64, 128, 256, 512)


class Padding(NamedTuple):
    """The padding token's key and value [B, H, 1, D], and the log of how many it stands for, a scalar in fp32."""

    key: torch.Tensor
    value: torch.Tensor
    log_count: torch.Tensor


def kept(lengths: Sequence[int], full: int, *, merged: bool, rounded: bool) -> int:
    """How many of `full` tokens stay: all own tokens, one for the padding unless `merged`; if `rounded`, up to one of LENGTHS."""
    longest = max(lengths) + (0 if merged else 1)
    if rounded:
        longest = next((length for length in LENGTHS if length >= longest), full)
    return min(full, longest)


def bias(lengths: Sequence[int], full: int, count: int, device: torch.device) -> torch.Tensor:
    """The bias [B, 1, 1, S] of the logits of the `count` kept tokens."""
    out = torch.zeros(len(lengths), 1, 1, count, dtype=torch.float32)
    for index, length in enumerate(lengths):
        if length < full:
            # count - length of this prompt's padding tokens remain; the last one also represents those that were cut off.
            out[index, ..., count - 1] = math.log(full - count + 1)
    return out.to(device)


def log_count(full: int, count: int, device: torch.device) -> torch.Tensor:
    """The log of how many padding tokens follow the kept ones, a scalar; minus infinity for none."""
    return torch.tensor(math.log(full - count) if count < full else -math.inf, dtype=torch.float32, device=device)


def merge(out: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, padding: Padding) -> torch.Tensor:
    """Attention over the own tokens, `out` [B, H, T, D] with its log-sum-exp [B, H, T] -> over those and the padding."""
    # In the order that keeps the fewest fp32 tensors of this size, 1.5 GB each at 720p on a lone GPU.
    logits = (query * padding.key.float()).sum(-1) * query.shape[-1] ** -0.5
    own = torch.sigmoid(lse - logits - padding.log_count).unsqueeze(-1)
    return (out * own).addcmul_(padding.value.float(), 1 - own).to(out.dtype)
