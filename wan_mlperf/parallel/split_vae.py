"""DistVAE, attached to the decoder from outside: each rank of the replica decodes a band of rows or columns.

Each rank converts its band to uint8, and only the replica's first rank gathers them: a quarter of the bytes of DistVAE's own
all-gather of floats, and no rank receives pixels it does not need. A band's convolutions start before the neighbours' edges have
arrived, and each rank computes attention for its own band only.
"""

from __future__ import annotations

import math
from types import MethodType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import nn

from wan_mlperf.parallel.mesh import Mesh
from wan_mlperf.vae_decode import Gather

if TYPE_CHECKING:
    from distvae.models.layers.conv2d import PatchConv2d
    from distvae.models.layers.conv3d import PatchConv3d
    from distvae.modules.adapters.layers.attn_adapters import GatheredAttentionAdapter

HEIGHT, WIDTH = -2, -1


class Bands(Gather):
    """How the ranks of a replica share the decode: which side of the picture is split, and the length of each rank's band."""

    def __init__(self, mesh: Mesh, *, latent_height: int, latent_width: int) -> None:
        self._mesh, self._ranks = mesh, mesh.shape.per_replica
        self.patch_dim, _ = most_even_side(latent_height, latent_width, self._ranks)
        self.fit(latent_height, latent_width)

    def fit(self, latent_height: int, latent_width: int) -> None:
        """Set the bands for a video of this size. As in DistVAE, the first ranks take one row (or column) more if need be."""
        band, longer = divmod(latent_height if self.patch_dim == HEIGHT else latent_width, self._ranks)
        self.shares = [band + (rank < longer) for rank in range(self._ranks)]

    @property
    def own(self) -> int:
        """The length of this rank's band, in latents."""
        return self.shares[self._mesh.rank_in_replica]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor | None:
        """Gather the chunks of all ranks: see `Gather`."""
        patch_dim, scale = self.patch_dim, pixels.shape[self.patch_dim] // self.own
        missing = (max(self.shares) - self.own) * scale
        padding = (0, 0, 0, missing) if patch_dim == HEIGHT else (0, missing)
        parts = self._mesh.gather_to_first(F.pad(pixels, padding).contiguous())
        if parts is None:
            return None
        whole = [part.narrow(patch_dim, 0, share * scale) for part, share in zip(parts, self.shares, strict=True)]
        return torch.cat(whole, patch_dim)


def shard_decoder(vae: AutoencoderKLWan, mesh: Mesh, *, latent_height: int, latent_width: int) -> Gather:
    """Shard `vae.decoder`, in place, over the ranks of the replica. Returns what gathers the bands."""
    if mesh.shape.per_replica == 1:
        return Gather()
    from distvae.modules.adapters.vae.decoder_adapters import WanDecoderAdapter

    bands = Bands(mesh, latent_height=latent_height, latent_width=latent_width)
    vae.decoder = WanDecoderAdapter(vae.decoder, vae_group=mesh.vae_group, patch_dim=bands.patch_dim).eval()
    vae.decoder.depatchify = nn.Identity()
    _compute_while_edges_travel(vae.decoder, mesh, bands.patch_dim)
    _attend_for_own_band(vae.decoder, mesh, bands)
    return bands


def most_even_side(height: int, width: int, ranks: int) -> tuple[int, int]:
    """Return (axis, length) of the side that divides most evenly; in a tie the rows, which are contiguous in memory.

    At 720p, eight ranks share 160 columns evenly, but get 12 or 11 of 90 rows. At 192 x 320 on two cores, where both sides
    divide, half of the rows took 0.53 of one rank's time, half of the columns 0.56.
    """
    sides = [(HEIGHT, height), (WIDTH, width)]
    return min(sides, key=lambda side: -(-side[1] // ranks) / side[1] if side[1] >= ranks else math.inf)


def _compute_while_edges_travel(decoder: nn.Module, mesh: Mesh, patch_dim: int) -> None:
    """Replace the forward of the convolutions that read one row (or column) of each neighbour's band.

    DistVAE waits for those rows, copies the band together with them, computes one row too many, and copies the result. Here the
    band is convolved as if zeros surrounded it while the rows are on their way. What the rows contribute to the band's edge is
    added afterwards, with the one row of the kernel that covers them. The sums are the same, in another order.
    """
    from distvae.models.layers.conv2d import PatchConv2d
    from distvae.models.layers.conv3d import PatchConv3d

    exchange = mesh.exchange
    assert exchange is not None
    neighbours = {mesh.rank_in_replica - 1: (0, 0), mesh.rank_in_replica + 1: (-1, 2)}  # own edge, and the kernel's row beyond it
    neighbours = {rank: where for rank, where in neighbours.items() if 0 <= rank < mesh.shape.per_replica}

    def forward(
        conv: PatchConv2d | PatchConv3d, band: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
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


def _attend_for_own_band(decoder: nn.Module, mesh: Mesh, bands: Bands) -> None:
    """Replace the forward of the attention over a frame: each rank gets all keys and values, but only its own band's queries.

    In DistVAE every rank computes the attention of the whole frame: at 720p, 4 x 14,400^2 x 384 = 0.3 TFLOP for each of 21 latent
    frames. This way eight ranks share that work. The sums are the same, in another order.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock
    from distvae.modules.adapters.layers.attn_adapters import GatheredAttentionAdapter

    exchange, own = mesh.exchange, mesh.rank_in_replica
    assert exchange is not None

    def forward(adapter: GatheredAttentionAdapter, band: torch.Tensor) -> torch.Tensor:
        block, frames = adapter.module, band.transpose(1, 2)  # [B, T, C, h, w]
        images = frames.flatten(0, 1)
        queries, keys_values = block.to_qkv(block.norm(images)).flatten(2).mT.split([block.dim, 2 * block.dim], -1)
        tokens = [share * (keys_values.shape[1] // bands.own) for share in bands.shares]
        padded = F.pad(keys_values, (0, 0, 0, max(tokens) - tokens[own])).contiguous()
        parts = exchange.start({rank: padded for rank in range(len(tokens)) if rank != own})() | {own: padded}
        keys, values = torch.cat([parts[rank][:, :count] for rank, count in enumerate(tokens)], 1).chunk(2, -1)
        seen = F.scaled_dot_product_attention(queries.unsqueeze(1), keys.unsqueeze(1), values.unsqueeze(1)).squeeze(1)
        return (block.proj(seen.mT.reshape(images.shape)).unflatten(0, frames.shape[:2]) + frames).transpose(1, 2)

    for attention in decoder.modules():
        if isinstance(attention, GatheredAttentionAdapter):
            assert isinstance(attention.module, WanAttentionBlock)
            attention.forward = MethodType(forward, attention)
