"""The pieces of low-precision attention in plain PyTorch, on any device; reference.py puts them together.

B batch, H heads, T tokens (Tq of the queries, Tk of the keys), D head dim, G = D / 32 blocks of a token, N = B x H.

These are references, written to be correct: they show, and let tests check, what a schedule of low-precision attention
does to a video without the hardware. Quantised operands are stored as the float32 numbers that they represent, so their
products are as exact as the hardware's, which also accumulates in float32.

Means, and all scales except those per tensor, belong to one head of one sample, so a head's result does not depend on the
rank that holds it. Ring attention, which splits the tokens, would change them.

Sources, by their short names below:
  AITER   github.com/ROCm/aiter, `fav3_sage_attention_mxfp4` with `sage_quant_mxfp4` and `downcast_to_mxfp`
  MX      OCP Microscaling Formats (MX) specification 1.0: E2M1 elements, one E8M0 scale per 32 of them
  Sage    SageAttention, arXiv 2410.02367, section 4.2: K minus its mean over tokens leaves the softmax as it is
  FA3     FlashAttention-3, arXiv 2407.08608, section 3.3 (FP8, rotation), and `Max_offset` of its Hopper forward kernel
"""

from functools import lru_cache

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634
MX_BLOCK = 32  # values that share one E8M0 scale (MX)
KEY_TILE = 64  # keys between two updates of the running maximum: the tile of AITER's golden outputs
E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; bit 3 is the sign
E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
E4M3_MAX = 448.0
E4M3_SMALLEST = 2.0**-6  # the smallest normal number
INT8_MAX = 127.0
NV_BLOCK = 16  # values that share one E4M3 scale in NVFP4
# Scores computed at a time: on a CPU 4 MiB, which fits its caches; elsewhere 256 MiB, because few large launches are faster.
CPU_SCORES = 1 << 20
DEVICE_SCORES = 1 << 26

# Mantissa bits and smallest normal number of what probabilities are rounded to.
ROUNDING = {"fp8": (3, E4M3_SMALLEST), "fp16": (10, 2.0**-14), "16 bits": (7, 2.0**-126)}

_EXPONENT = 0x7F800000  # the exponent bits of a float32
_MANTISSA = 0x007FFFFF
_SMALLEST_NORMAL = 2.0**-126
_BELOW_HALF = (0x3F000000 >> 22) - 1  # exponent and first bit of the mantissa of what is just below 0.5


@lru_cache(maxsize=32)
def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normalised Hadamard matrix [size, size] by Sylvester's construction, rounded to `dtype` as AITER's is."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"hadamard size {size}: a power of two is needed")
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix.div_(size**0.5).to(device=device, dtype=dtype)


def rotate(x: Tensor, scale: float = 1.0) -> Tensor:
    """Spread outliers over the head dim: x [..., D] times a block-diagonal Hadamard matrix and `scale`, in x's dtype.

    Rotating Q and K alike leaves Q K^T as it is. The block is 128 (AITER, and xDiT's default) or, where that does not
    divide D, the largest power of two that does. Product and scale are float32, rounded once (AITER's `_rot_q_kernel`).
    """
    size = min(128, x.shape[-1] & -x.shape[-1])
    rotated = torch.mm(x.float().reshape(-1, size), hadamard(size, x.dtype, x.device).float())
    return rotated.mul_(scale).to(x.dtype).view(x.shape)


def smooth(k: Tensor) -> Tensor:
    """K [..., Tk, D] minus its mean over tokens (Sage), in K's dtype as AITER does it."""
    return k - k.mean(-2, keepdim=True)


def _mx_scales(blocks: Tensor) -> Tensor:
    """Scales [..., G, 1] of float32 blocks [..., G, 32]: the smallest power of two not below amax / 6, or zero."""
    return power_of_two(blocks.abs().amax(-1, keepdim=True) / E2M1_MAX)


def power_of_two(x: Tensor) -> Tensor:
    """The smallest power of two not below each positive float32 number, or zero."""
    # Adding ones in all mantissa bits carries into the exponent unless the mantissa is zero: a power of two stays.
    return (x.view(torch.int32) + _MANTISSA).bitwise_and_(_EXPONENT).view(torch.float32)


def quantise_mxfp4(x: Tensor, *, ties_away: bool = True) -> tuple[Tensor, Tensor]:
    """Quantise x [..., D] to MXFP4 as AITER does.

    Returns codes uint8 [..., D / 2], two E2M1 a byte with the even element in the low nibble, and E8M0 scales uint8
    [..., G]. The scales are those of torchao's RCEIL mode. Half-way values go to the code away from zero in `downcast_to_mxfp`
    (Sage attention), to the even one in `per_1x32_f4_quant` (linear layers) and in torchao.
    """
    if x.shape[-1] % MX_BLOCK:
        raise ValueError(f"last dimension {x.shape[-1]}: MXFP4 needs a multiple of {MX_BLOCK}")
    blocks = x.float().contiguous().unflatten(-1, (-1, MX_BLOCK))
    scales = _mx_scales(blocks)
    scaled = blocks * torch.where(scales == 0, 0.0, 1 / scales)
    signs = (scaled.view(torch.int32) >> 28).bitwise_and_(8)
    if ties_away:  # see `round_to_mxfp4`
        scaled = (scaled.view(torch.int32) | 1).view(torch.float32)
    # From 1 up, exponent and first mantissa bit count E2M1's numbers; below 1 there are only 0.5 and zero.
    codes = (_round_mantissa_(scaled, 1.0, 1).abs_().view(torch.int32) >> 22).sub_(_BELOW_HALF).clamp_(min=0)
    codes = codes.sub_((codes > 1).int()).bitwise_or_(signs).to(torch.uint8)
    low, high = codes.flatten(-2).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4, (scales.view(torch.int32) >> 23).squeeze(-1).to(torch.uint8)


def dequantise_mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 numbers [..., D] that packed codes [..., D / 2] and E8M0 scales [..., G] represent."""
    values = torch.tensor(E2M1_VALUES, device=codes.device)
    values = torch.cat([values, -values])
    elements = values[torch.stack([codes & 15, codes >> 4], -1).flatten(-2).int()]
    powers = torch.exp2(scales.float() - 127).unsqueeze(-1)
    return (elements.unflatten(-1, (-1, MX_BLOCK)) * powers).flatten(-2)


def _round_mantissa_(x: Tensor, smallest: Tensor | float, bits: int) -> Tensor:
    """Round float32 x in place to `bits` mantissa bits, ties to even; below `smallest`, a power of two, as subnormals.

    Adding and subtracting 1.5 x 2^(23 - bits) times the power of two below |x| leaves exactly those bits. On a CPU this
    takes a fifth of the time of a cast to float8 and back (46 instead of 219 us for 80 x 80 scores of 8 heads).
    """
    power = (x.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(min=smallest)
    power.mul_(1.5 * 2.0 ** (23 - bits))
    return x.add_(power).sub_(power)


def round_to_e4m3(x: Tensor) -> Tensor:
    """Return the nearest E4M3 numbers to x, ties to even, as float32. x must be within +-448: nothing saturates."""
    return _round_mantissa_(x.float().clone(), E4M3_SMALLEST, 3)


def round_to_mxfp4(x: Tensor, *, ties_away: bool = True) -> Tensor:
    """`dequantise_mxfp4(*quantise_mxfp4(x))` without making codes: x [..., D] to float32 [..., D].

    Half-way values are rounded away from zero, as in AITER's Triton quantiser, or to even, as gfx950 converts.
    """
    blocks = x.float().contiguous().unflatten(-1, (-1, MX_BLOCK))
    smallest = _mx_scales(blocks).clamp_(min=_SMALLEST_NORMAL)
    # Setting the last bit breaks ties away from zero and never creates one: ties end in zeros.
    rounded = (blocks.view(torch.int32) | 1).view(torch.float32) if ties_away else blocks.clone()
    return _round_mantissa_(rounded, smallest, 1).flatten(-2)


def round_to_nvfp4(x: Tensor) -> Tensor:
    """Round x [..., D] to NVFP4, as float32: E2M1, one scale amax / 6 in E4M3 per 16 values, as FlashInfer's quantiser."""
    if x.shape[-1] % NV_BLOCK:
        raise ValueError(f"last dimension {x.shape[-1]}: NVFP4 needs a multiple of {NV_BLOCK}")
    blocks = x.float().contiguous().unflatten(-1, (-1, NV_BLOCK))
    scales = round_to_e4m3((blocks.abs().amax(-1, keepdim=True) / E2M1_MAX).clamp_(max=E4M3_MAX))
    scaled = blocks * torch.where(scales == 0, 0.0, 1 / scales)
    # A scale that was rounded down leaves its largest value above 6, where E2M1 ends.
    return _round_mantissa_(scaled, 1.0, 1).clamp_(-E2M1_MAX, E2M1_MAX).mul_(scales).flatten(-2)


def round_to_int8(x: Tensor, group: int) -> Tensor:
    """Round x [B, H, T, D] to INT8, as float32: one scale amax / 127 per `group` tokens of a head, halves away from zero."""
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, -x.shape[-2] % group)).unflatten(-2, (-1, group))
    scales = (padded.abs().amax((-2, -1), keepdim=True) / INT8_MAX).clamp_(min=_SMALLEST_NORMAL)
    rounded = padded / scales
    rounded = (rounded + 0.5 * rounded.sign()).trunc_().mul_(scales)
    return rounded.flatten(-3, -2)[..., : x.shape[-2], :].contiguous()


def quantise_e4m3(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Quantise x to E4M3 with one float32 scale amax / 448 over `dims`: the E4M3 numbers as float32, and the scales.

    If all values are zero, the scale is the smallest normal number and the result zero; AITER divides zero by zero.
    """
    scales = (x.abs().amax(dims, keepdim=True).float() / E4M3_MAX).clamp_(min=_SMALLEST_NORMAL)
    return _round_mantissa_(x.float().contiguous() / scales, E4M3_SMALLEST, 3), scales


def _tiles(scores: Tensor) -> list[tuple[slice, Tensor]]:
    """Views [N, Tq, tiles, 64] and, if keys are left over, [N, Tq, 1, rest], each with its tiles' numbers, from 1."""
    keys = scores.shape[-1]
    whole = keys // KEY_TILE
    tiles = []
    if whole:
        tiles.append((slice(1, whole + 1), scores[..., : whole * KEY_TILE].unflatten(-1, (whole, KEY_TILE))))
    if keys % KEY_TILE:
        tiles.append((slice(whole + 1, whole + 2), scores[..., whole * KEY_TILE :].unsqueeze(-2)))
    return tiles


def attend(
    q: Tensor, k: Tensor, v: Tensor, v_scales: Tensor, offset: float, dtype: torch.dtype, probabilities: str = "fp8"
) -> Tensor:
    """Base-2 softmax attention with rounded probabilities: q [B, H, Tq, D] in units of log2, k and v [B, H, Tk, D].

    As in the loops of AITER and FA3, a tile of 64 keys uses the largest score of its row up to and including itself, and
    its unnormalised probabilities 2^(score - that maximum + offset) are rounded for the product with V, but not for their
    sum. Those loops rescale what they have accumulated after every tile. Here as many tiles as the budget allows are
    computed at once and weighted by the last maximum; everything before them counts as tile 0.
    """
    bits, smallest = ROUNDING[probabilities]
    batch, heads, queries, _ = q.shape
    keys, n = k.shape[-2], batch * heads
    budget = CPU_SCORES if q.device.type == "cpu" else DEVICE_SCORES
    key_step = min(keys, max(KEY_TILE, budget // (n * KEY_TILE) // KEY_TILE * KEY_TILE))
    query_step = min(queries, max(1, budget // (n * key_step)))
    q, k, v = q.flatten(0, 1), k.flatten(0, 1).mT, v.flatten(0, 1)
    out = torch.empty(n, queries, v.shape[-1], dtype=dtype, device=q.device)
    for rows in (slice(start, start + query_step) for start in range(0, queries, query_step)):
        total = q.new_zeros(n, q[:, rows].shape[1], 1)
        maximum = torch.full_like(total, -torch.inf)
        weighted = total.expand(-1, -1, v.shape[-1])
        for columns in (slice(start, start + key_step) for start in range(0, keys, key_step)):
            scores = torch.bmm(q[:, rows], k[..., columns])
            tiles = _tiles(scores)
            running = torch.cat([maximum, *(tile.amax(-1) for _, tile in tiles)], -1).cummax(-1).values
            maximum = running[..., -1:]
            weights = torch.exp2(running - maximum)
            shifts = (running - offset).unsqueeze(-1)
            for numbers, tile in tiles:
                tile.sub_(shifts[..., numbers, :])
            scores.exp2_()
            total = torch.cat([total, *(tile.sum(-1) for _, tile in tiles)], -1).mul_(weights).sum(-1, keepdim=True)
            _round_mantissa_(scores, smallest, bits)
            for numbers, tile in tiles:
                tile.mul_(weights[..., numbers, None])
            weighted = torch.baddbmm(weighted * weights[..., :1], scores, v[:, columns])
        out[:, rows] = weighted.div_(total).mul_(v_scales.flatten(0, 1))
    return out.unflatten(0, (batch, heads))


@torch.no_grad()
def sage_fp4_from_quantised(
    q_codes: Tensor,
    q_scales: Tensor,
    k_codes: Tensor,
    k_scales: Tensor,
    v_fp8: Tensor,
    v_scales: Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """AITER's `fav3_sage_mxfp4_func` on its own operands: returns [B, H, Tq, D], in bfloat16 as it does or in `dtype`.

    Codes uint8 [B, H, T, D / 2] and scales uint8 [B, H, T, G] as `quantise_mxfp4` gives them, of Q log2(e) / sqrt(D);
    v_fp8 [B, H, Tk, D], E4M3 or its numbers as float32; v_scales float32 [B, H, D].
    """
    q, k = dequantise_mxfp4(q_codes, q_scales), dequantise_mxfp4(k_codes, k_scales)
    return attend(q, k, v_fp8.float(), v_scales.unsqueeze(-2), 0.0, dtype)
