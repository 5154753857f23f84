"""DistVAE attached to the decoder from outside: each rank of the replica decodes a band of rows or columns.

The bands are turned to uint8 where they were decoded and gathered on the replica's first rank only: a quarter of the bytes of
DistVAE's own all-gather of floats, and no rank receives pixels that it does not need.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from wan_mlperf.parallel.mesh import Mesh
from wan_mlperf.vae_decode import Gather

HEIGHT, WIDTH = -2, -1


def shard_decoder(vae: Any, mesh: Mesh, *, latent_height: int, latent_width: int) -> Gather:
    """Shard `vae.decoder` over the ranks of the replica; return how the bands come together."""
    ranks = mesh.shape.per_replica
    if ranks == 1:
        return _whole
    from distvae.modules.adapters.vae.decoder_adapters import WanDecoderAdapter

    patch_dim, length = most_even_side(latent_height, latent_width, ranks)
    vae.decoder = WanDecoderAdapter(vae.decoder, vae_group=mesh.vae_group, patch_dim=patch_dim).eval()
    vae.decoder.depatchify = nn.Identity()
    # The split that DistVAE makes: the first ranks take one row more where the rows do not divide.
    band, longer = divmod(length, ranks)
    shares = [band + (rank < longer) for rank in range(ranks)]
    widest = max(shares)

    def gather(pixels: torch.Tensor) -> torch.Tensor | None:
        scale = pixels.shape[patch_dim] // shares[mesh.rank_in_replica]
        missing = (widest - shares[mesh.rank_in_replica]) * scale
        padding = (0, 0, 0, missing) if patch_dim == HEIGHT else (0, missing)
        parts = mesh.gather_to_first(F.pad(pixels, padding).contiguous())
        if parts is None:
            return None
        return torch.cat([part.narrow(patch_dim, 0, share * scale) for part, share in zip(parts, shares, strict=True)], patch_dim)

    return gather


def most_even_side(height: int, width: int, ranks: int) -> tuple[int, int]:
    """Return (axis, length) of the side whose bands differ least; of two alike the rows, which lie together in memory.

    At 720p eight ranks share 160 columns evenly and 90 rows as 12 and 11. On two cores at 192 x 320, where both sides divide,
    halves of the rows took 0.53 of one rank's time, halves of the columns 0.56.
    """
    sides = [(HEIGHT, height), (WIDTH, width)]
    return min(sides, key=lambda side: -(-side[1] // ranks) / side[1] if side[1] >= ranks else math.inf)


def _whole(pixels: torch.Tensor) -> torch.Tensor:
    return pixels
