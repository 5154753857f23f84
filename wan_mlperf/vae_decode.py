"""Latents -> uint8 frames, chunk by chunk as they are decoded.

The decoder keeps a cache of features, so it can be called on the first latent frame (1 video frame) and then on any number of
them at a time (4 video frames each). The values are those that diffusers' `export_to_video` makes of `output_type="np"`: times
255, truncated.

Shapes: B videos, Z latent channels, F latent frames, h w latent height and width; frames are [B, n, height, width, 3].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import nn

from wan_mlperf.kernels import vae as kernels
from wan_mlperf.spans import Spans


class Gather:
    """Joins the bands of all ranks. In this class one rank has it all; `parallel/split_vae.py` has the one for several."""

    def fit(self, latent_height: int, latent_width: int) -> None:
        """Prepare for a video of this size."""

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor | None:
        """[B, 3, n, band height, width] uint8 -> the whole frames on the first rank, None elsewhere."""
        return pixels


class VaeDecoder:
    """Decodes with an AutoencoderKLWan whose decoder may have been sharded (`parallel/split_vae.py`).

    `bitwise` keeps PyTorch's own operations, so that results are bit for bit diffusers' (see `kernels/vae.py`).
    """

    def __init__(self, vae: AutoencoderKLWan, *, chunk: int, gather: Gather, bitwise: bool = False) -> None:
        self.vae = vae
        self.chunk = chunk
        self.gather = gather
        self.decoder: Callable[..., torch.Tensor] = vae.decoder
        config = vae.config
        shape = (1, config.z_dim, 1, 1, 1)
        parameter = next(vae.parameters())
        to = {"device": parameter.device, "dtype": parameter.dtype}
        self._mean = torch.tensor(config.latents_mean).view(shape).to(**to)
        self._scale = 1.0 / torch.tensor(config.latents_std).view(shape).to(**to)
        vae.clear_cache()
        self._kernels: Callable[[], AbstractContextManager[object]] = (
            nullcontext if bitwise else functools.partial(kernels.fast, parameter.device)
        )
        self._layout = torch.contiguous_format if bitwise else kernels.prepare(vae)
        self._slots: int = len(vae._feat_map)  # number of convolutions that keep features

    def decode(self, latents: torch.Tensor) -> Iterator[torch.Tensor | None]:
        """Yield the frames of `latents` [B, Z, F, h, w] as uint8 [B, n, height, width, 3] on the device, n = 1 then <= 4 x chunk.

        A rank that is not its replica's first yields None for each chunk. Every rank must exhaust the iterator.
        """
        latents = latents.to(self._mean.dtype) / self._scale + self._mean
        hidden = self.vae.post_quant_conv(latents)
        self.gather.fit(*hidden.shape[-2:])
        features: list[object] = [None] * self._slots
        count = hidden.shape[2]
        starts = [0, *range(1, count, self.chunk)]
        for start, stop in zip(starts, [*starts[1:], count], strict=True):
            some = hidden[:, :, start:stop].contiguous(memory_format=self._layout)
            with self._kernels():
                pixels = self.decoder(some, feat_cache=features, feat_idx=[0], first_chunk=start == 0)
            whole = self.gather(to_uint8(pixels))
            yield None if whole is None else whole.permute(0, 2, 3, 4, 1)


def to_host(chunks: Iterator[torch.Tensor | None], device: torch.device, spans: Spans) -> Iterator[np.ndarray]:
    """Yield the chunks that this rank has, in host memory and C order.

    On a GPU each chunk is copied into pinned memory on a separate stream, and awaited only after the next chunk's decode has been
    launched. On a CPU it is yielded at once.
    """
    if device.type != "cuda":
        for chunk in chunks:
            if chunk is not None:
                with spans("to_host"):
                    host = chunk.contiguous()
                yield host.numpy()
        return
    copies = _copy_stream(device)
    waiting: tuple[torch.Tensor, torch.cuda.Event, torch.cuda.Event] | None = None  # a chunk, when decoded, when copied
    for chunk in chunks:
        if chunk is None:
            continue
        decoded, copied = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        decoded.record(torch.cuda.current_stream(device))
        with torch.cuda.stream(copies):
            copies.wait_event(decoded)
            whole = chunk.contiguous()
            host = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=True)
            host.copy_(whole, non_blocking=True)
            chunk.record_stream(copies)
            copied.record(copies)
        if waiting is not None:
            waiting[2].synchronize()
            yield waiting[0].numpy()
        waiting = host, decoded, copied
    if waiting is not None:
        host, decoded, copied = waiting
        copied.synchronize()
        # The other copies ran beside the decode of the chunk after them; only this one takes time of the query.
        spans.add("to_host", decoded.elapsed_time(copied) / 1e3)
        yield host.numpy()


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream that all queries copy on: each new stream would bring its own pool of pinned and device memory."""
    return torch.cuda.Stream(device)


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Map values in [-1, 1] (clamped) to 0 .. 255, truncated, as diffusers' video processor and export_to_video do."""
    pixels = pixels.clamp(-1.0, 1.0)
    return (pixels * 0.5 + 0.5).clamp(0.0, 1.0).float().mul(255).to(torch.uint8)


def compile_decoder(decoder: VaeDecoder) -> None:
    """Compile the decoder. The first call with each chunk length then takes seconds."""
    assert isinstance(decoder.decoder, nn.Module)
    decoder._kernels = nullcontext  # the compiler chooses
    # A sharded convolution is compiled once per layer, and beyond this limit torch would run it eagerly.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    decoder.decoder = torch.compile(decoder.decoder)
