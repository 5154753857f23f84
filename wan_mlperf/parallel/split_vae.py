"""DistVAE attached to the decoder from outside: each rank of the replica decodes a band of rows.

The bands are turned to uint8 where they were decoded and gathered on the replica's first rank only: a quarter of the bytes of
DistVAE's own all-gather of floats, and no rank receives pixels that it does not need.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from wan_mlperf.parallel.mesh import Mesh
from wan_mlperf.vae_decode import Gather

HEIGHT, WIDTH = -2, -1


def shard_decoder(vae: Any, mesh: Mesh, *, latent_height: int, latent_width: int) -> Gather:
    """Shard `vae.decoder` over the ranks of the replica, along the longer side; return how the
    bands come together."""
    ranks = mesh.shape.per_replica
    if ranks == 1:
        return _whole
    from distvae.modules.adapters.vae.decoder_adapters import WanDecoderAdapter

    # On equal sides the width: PyTorch's CPU convolution takes its fast path by channels x frames x height, whatever the width,
    # and half the height fell off it (two ranks took twice one rank's time on the embedded model, and now take 0.6 of it).
    patch_dim = HEIGHT if latent_height > latent_width else WIDTH
    length = max(latent_height, latent_width)
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


def _whole(pixels: torch.Tensor) -> torch.Tensor:
    return pixels
