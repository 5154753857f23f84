"""Run on every rank by test_sharded_decode.py: the decode by the operations that a GPU takes, on a CPU.

Of a GPU's path all but the copies to the host runs here: edges over the process group, PyTorch's own convolutions with the
channels last, the band's attention. What it cannot show: NCCL, and kernels that round otherwise.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from wan_mlperf.kernels import vae as kernels
from wan_mlperf.kernels.device import probe
from wan_mlperf.parallel import exchange, mesh, split_vae
from wan_mlperf.vae_decode import VaeDecoder

FRAMES, ROWS, COLUMNS = 5, 8, 6


def layout_of_a_gpu(vae: torch.nn.Module) -> torch.memory_format:
    """What `prepare` does on a GPU, without what replaces operations on a CPU."""
    kernels.fewer_passes(vae, in_16_bits=True)
    for layer in vae.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Conv3d):
            last = torch.channels_last if isinstance(layer, torch.nn.Conv2d) else torch.channels_last_3d
            layer.weight.data = layer.weight.data.contiguous(memory_format=last)
    return torch.channels_last_3d


@torch.inference_mode()
def main(folder: Path, output: Path, world: int) -> None:
    """Decode noise by the VAE of a checkpoint's `folder` on `world` ranks; the first one saves the frames as `output`."""
    mesh.connect = lambda group, **_: exchange.ProcessGroupExchange(group)
    kernels.prepare = layout_of_a_gpu
    kernels.fast = lambda device: nullcontext()
    groups = mesh.start(mesh.Shape(replicas=1, cfg=1, ulysses=world, ring=1), probe())
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae").eval()
    gather = split_vae.shard_decoder(vae, groups, latent_height=ROWS, latent_width=COLUMNS)
    decoder = VaeDecoder(vae, chunk=2, gather=gather)
    noise = torch.randn(1, vae.config.z_dim, FRAMES, ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    chunks = [chunk for chunk in decoder.decode(noise) if chunk is not None]
    if groups.rank == 0:
        torch.save(torch.cat(chunks, 1), output)
    groups.close()
