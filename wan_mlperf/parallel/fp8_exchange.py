"""Self-attention whose Q, K and V cross between ranks as E4M3 (kernels/e4m3.py), through xDiT's exchange and its ring.

USP's order, with bytes in place of values: they are rounded once, before the all-to-all, and K and V go round the ring as they
arrived. The output returns in the model's dtype. Every device and every attention kernel takes this path.

xDiT's own FP8 exchange (`use_fp8_comms`, with an `attn_layer` passed to USP) is not used: its scales are frozen after one
video, so that every later result depends on that one and larger values are cut off; they are per tensor; it covers only
AITER_FP8, four of the twenty steps of AMD's schedule; and it rounds the output, too.

B batch, H heads, T tokens of a rank, D head dim, U Ulysses degree.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from wan_mlperf.kernels import e4m3
from wan_mlperf.parallel.xdit import Key


def attend(
    usp: ModuleType, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, backend: Key, tokens: int
) -> torch.Tensor:
    """Attention of all ranks' tokens: q, k, v [B, H, T, D] -> [B, H, T, D]. `backend` is a key of xDiT's attention registry.

    `usp` is xDiT's module of that name. `tokens` counts those of all ranks, without the zeros that pad the last shares.
    """
    ulysses, ring = usp.get_ulysses_parallel_world_size(), usp.get_ring_parallel_world_size()
    function, dtype = usp._get_attention_function(backend=backend), query.dtype

    def values(packed: torch.Tensor) -> torch.Tensor:
        """[B, H / U, U (T + 1), D] -> [B, H / U, U T, D]."""
        return e4m3.unpack(packed.unflatten(2, (ulysses, -1)), dtype).flatten(2, 3)

    def on_packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> Any:
        # The shares of a ring have no padding (split_experts.check), so that all of `tokens` are a multiple of theirs.
        own = tokens // ring if ring > 1 else tokens
        return function(query, values(key)[:, :, :own], values(value)[:, :, :own], **kwargs)

    query = values(usp._ft_c_input_all_to_all(e4m3.pack(query)))
    key = usp._ft_c_input_all_to_all(e4m3.pack(key))
    value = usp._ft_c_input_all_to_all(e4m3.pack(value))
    if ring > 1:
        out = usp.ring_attn(on_packed, query, key, value)
    else:
        out = on_packed(query, key, value, dropout_p=0.0, is_causal=False)[0]
    return usp._ft_c_output_all_to_all(out)
