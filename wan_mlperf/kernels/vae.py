"""The VAE's convolutions and norms in the fastest way for each device, and the memory layout that suits them.

On a GPU convolutions are PyTorch's own, with the channels last (2.7 to 3.7 times as fast on Hopper, sgl-project/sglang 27431) and
a search for the fastest kernel, once for each of the few shapes. On every device:

- diffusers' norm and activation make five large tensors, one of them to add zero. Here they make one, and change it in place; in
  16 bits two, the first in fp32, where diffusers makes seven. On an H100 the passes left out took 0.4 of 4.9 s, in fp32.

On a CPU, in fp32, three more things are done differently:

- PyTorch passes a convolution to oneDNN only if videos x channels x frames x height exceed 20,480; otherwise it unfolds it into
  one matrix product per frame. A decoder with few channels, or one rank's band, is below that and takes up to twice as long.
- oneDNN reorders every input and output whose channels are not last. With channels last, the whole decode of the embedded model
  takes 0.88 of the time (one core with AVX2), and the transposes between frames and video are views.
- Causal convolutions pad by copying, after another copy that puts the last frames before the new ones, while oneDNN pads at no
  extra cost. Products with the zeros before the first frame are left out: two thirds of the first frame's products.

Sums are then computed in another order, so results are the same except for rounding, not bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode


def set_up(device: torch.device, *, tf32: bool) -> None:
    """Set what convolutions on a GPU may do in this process: TF32 products (NVIDIA, fp32 only), and a search per shape."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True  # on ROCm: MIOpen's find, kept in its database (wan_mlperf/__init__.py)


def precision(vae: nn.Module, arch: str) -> str:
    """Say in words what the decode computes in."""
    dtype = next(vae.parameters()).dtype
    tf32 = dtype == torch.float32 and arch.startswith("sm") and torch.backends.cudnn.allow_tf32
    return f"{str(dtype).removeprefix('torch.')}{', products in TF32' if tf32 else ''}"


def prepare(vae: nn.Module) -> torch.memory_format:
    """Prepare an AutoencoderKLWan, sharded or not, for a decode with `fast`. Returns the memory format for its latents."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    device = next(vae.parameters()).device
    if not _is_ours(device) and device.type == "cpu":
        return torch.contiguous_format
    fewer_passes(vae, in_16_bits=device.type != "cpu")
    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            last = torch.channels_last if isinstance(layer, nn.Conv2d) else torch.channels_last_3d
            layer.weight.data = layer.weight.data.contiguous(memory_format=last)
        if not _is_ours(device):
            continue
        if isinstance(layer, WanCausalConv3d):
            width, _, height, _, _, _ = layer._padding
            layer.padding = (0, height, width)
        if hasattr(layer, "_padding"):  # a WanCausalConv3d, or DistVAE's adapter in its place
            layer.forward = MethodType(convolve_causally, layer)
    return torch.channels_last_3d


def fewer_passes(vae: nn.Module, *, in_16_bits: bool) -> None:
    """Let norms and activations read and write less. On a CPU 16 bits stay as diffusers has them (`in_16_bits`)."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    for layer in vae.modules():
        if isinstance(layer, nn.SiLU):
            layer.inplace = True  # on what a norm has just made
        if isinstance(layer, WanRMS_norm):
            layer.forward = MethodType(normalize_any if in_16_bits else normalize, layer)


def fast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which the VAE calls REPLACEMENTS. Nothing changes on a GPU, in dtypes but fp32, or without oneDNN."""
    return _Fast() if _is_ours(device) else nullcontext()


def _is_ours(device: torch.device) -> bool:
    return device.type == "cpu" and torch.backends.mkldnn.is_available()


class _Fast(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        replacement = REPLACEMENTS.get(function)
        if replacement is None or args[0].dtype != torch.float32:
            return function(*args, **(kwargs or {}))
        return replacement(*args, **(kwargs or {}))


def convolve(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """`F.conv2d` and `F.conv3d` of a batch with oneDNN. Paddings cannot be given by name."""
    sides = weight.ndim - 2
    stride, padding, dilation = ([one] * sides if isinstance(one, int) else list(one) for one in (stride, padding, dilation))
    return torch.ops.aten.mkldnn_convolution(input, weight, bias, padding, stride, dilation, groups)


def convolve_causally(layer: Any, frames: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """`forward` of `WanCausalConv3d` and of its sharded form; `frames` and the last ones `before` them are [B, C, T, H, W]."""
    convolution = getattr(layer, "conv3d", layer)
    weight, front = convolution.weight, layer._padding[4]
    pieces = [frames]
    if front and before is not None:
        pieces, front = [before, frames], front - before.shape[2]
    if front + sum(one.shape[2] for one in pieces) == weight.shape[2]:  # one frame comes out: the first rows meet only zeros
        weight, front = weight[:, :, front:], 0
    if front:
        shape = *frames.shape[:2], front, *frames.shape[3:]
        pieces.insert(0, frames.new_zeros(shape).contiguous(memory_format=torch.channels_last_3d))
    frames = torch.cat(pieces, 2) if len(pieces) > 1 else frames
    return convolution._conv_forward(frames, weight, convolution.bias)


def normalize(norm: Any, input: torch.Tensor) -> torch.Tensor:
    """`WanRMS_norm.forward` of [B, C, ...]; other dtypes than fp32 as diffusers does."""
    return normalize_any(norm, input) if input.dtype == torch.float32 else type(norm).forward(norm, input)


def normalize_any(norm: Any, input: torch.Tensor) -> torch.Tensor:
    """The same in any dtype. In 16 bits all is computed in fp32 and rounded once, where diffusers rounds three times."""
    inverse = torch.linalg.vector_norm(input, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(1e-12).reciprocal_()
    out = (input * inverse).mul_(norm.gamma.float() * norm.scale)
    out = out.add_(norm.bias) if isinstance(norm.bias, torch.Tensor) else out
    return out.to(input.dtype)


REPLACEMENTS: dict[Callable[..., Any], Callable[..., torch.Tensor]] = {
    F.conv2d: convolve,
    F.conv3d: convolve,
}
