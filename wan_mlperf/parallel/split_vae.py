"""DistVAE attached to the decoder from outside: each rank of the replica decodes a band of rows or columns.

The bands are turned to uint8 where they were decoded and gathered on the replica's first rank only: a quarter of the bytes of
DistVAE's own all-gather of floats, and no rank receives pixels that it does not need. A band's convolutions start before the
neighbours' edges are there.
"""

from __future__ import annotations

import math
from types import MethodType
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
    _compute_while_edges_travel(vae.decoder, mesh, patch_dim)
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


def _compute_while_edges_travel(decoder: nn.Module, mesh: Mesh, patch_dim: int) -> None:
    """Replace the forward of the convolutions that read one row (or column) of each neighbour's band.

    DistVAE waits for the rows, copies the band with them, computes one row too many, and copies the rest. Here the band is
    convolved as if zeros lay around it, while the rows travel; what they add to the band's own edge comes after, by the one
    row of the kernel that meets them. The sums are the same but for their order.
    """
    from distvae.models.layers.conv2d import PatchConv2d
    from distvae.models.layers.conv3d import PatchConv3d

    exchange = mesh.exchange
    assert exchange is not None
    neighbours = {mesh.rank_in_replica - 1: (0, 0), mesh.rank_in_replica + 1: (-1, 2)}  # own edge, the kernel's row beyond it
    neighbours = {rank: where for rank, where in neighbours.items() if 0 <= rank < mesh.shape.per_replica}

    def forward(conv: Any, band: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        function = F.conv2d if band.ndim == 4 else F.conv3d
        edges = {rank: band.select(patch_dim, own).contiguous() for rank, (own, _) in neighbours.items()}
        received = exchange.start(edges)
        out = function(band, weight, bias, conv.stride, conv.padding)
        padding = list(conv.padding)
        padding[patch_dim] = 0
        for rank, edge in received().items():
            own, kernel_row = neighbours[rank]
            kernel = weight.narrow(patch_dim, kernel_row, 1)
            missing = function(edge.unsqueeze(patch_dim), kernel, None, conv.stride, padding)
            out.select(patch_dim, own).add_(missing.squeeze(patch_dim))
        return out

    for conv in decoder.modules():
        if isinstance(conv, PatchConv2d | PatchConv3d) and (conv.kernel_size[patch_dim], conv.padding[patch_dim]) == (3, 1):
            assert set(conv.stride) == set(conv.dilation) == {1} and conv.padding_mode == "zeros"
            conv._conv_forward = MethodType(forward, conv)


def _whole(pixels: torch.Tensor) -> torch.Tensor:
    return pixels
