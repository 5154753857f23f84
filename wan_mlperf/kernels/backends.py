"""The one table of kernels for attention and linear layers: what each is, what it needs, and which one a recipe's name gets.

By architecture, best first. Everything that runs, probes, predicts, documents or lists kernels reads it. Does not import torch.
The numbers in comments are TFLOP/s on gfx950 at batch 1, 5 heads, 75,600 tokens and head dim 128 (ROCm/aiter pull 3495; those of
MHA v4: aiter/ops/mha_v4.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wan_mlperf.kernels import needs
from wan_mlperf.kernels.needs import Need
from wan_mlperf.kernels.numerics import SIXTEEN_BITS, Numerics

HALF = ("bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A kernel behind one of xDiT's attention backends (`xdit`, its name in AttentionBackendType).

    `flag`: xDiT imports the functions only if its package checker has found this. `without`: if all of this is installed, xDiT
    calls another kernel by the same name. `lse`: xDiT's function returns the log-sum-exp, so outputs can be merged. `bias`: it
    uses `attn_mask`, which all others ignore.
    """

    xdit: str
    numerics: Numerics = SIXTEEN_BITS
    needs: tuple[Need, ...] = ()
    without: Need | None = None
    flag: str = ""
    cudnn: bool = False
    dtypes: tuple[str, ...] = HALF
    head_dims: tuple[int, ...] = ()
    lse: bool = False
    bias: bool = False


_FP8_V = {"v": "fp8", "v_scales": "channel", "probabilities": "fp8"}
_PER_TENSOR = {"qk": "fp8", "qk_scales": "tensor", "v": "fp8", "v_scales": "tensor", "probabilities": "fp8"}

ATTENTION: Mapping[str, Backend] = {
    "SDPA": Backend(xdit="SDPA", dtypes=(*HALF, "float32"), bias=True),
    # 1196
    "AITER": Backend(xdit="AITER", needs=(needs.AITER_BF16,), flag="has_aiter", lse=True),
    # 3050. MHA v4 rotates Q and K for FP6 and FP4 only, whatever xDiT's comment says (mha_v4.py, `quantize_qk`).
    "AITER_FP8": Backend(
        xdit="AITER_FP8",
        needs=(needs.MHA_V4, needs.AITER_FP8),
        flag="has_aiter",
        numerics=Numerics(**_PER_TENSOR),  # type: ignore[arg-type]
        dtypes=("bfloat16",),
        head_dims=(128,),
    ),
    # 2028. What xDiT calls by the same name without MHA v4: it rotates Q and K itself. On gfx942 E4M3 is its FNUZ form.
    "AITER_FP8_V3": Backend(
        xdit="AITER_FP8",
        needs=(needs.AITER_FP8,),
        without=needs.MHA_V4,
        flag="has_aiter",
        numerics=Numerics(rotated=True, **_PER_TENSOR),  # type: ignore[arg-type]
        head_dims=(128,),
    ),
    # 1505. xDiT calls it "Sage (FP8)".
    "AITER_SAGE": Backend(
        xdit="AITER_SAGE",
        needs=(needs.AITER_SAGE, needs.AITER_BF16),
        flag="has_aiter",
        numerics=Numerics(qk="int8", qk_scales="tokens", groups=(256, 128), smoothed=True, **_FP8_V),  # type: ignore[arg-type]
    ),
    # 3695. The hardware rounds ties between two codes to the even one.
    "AITER_MXFP4": Backend(
        xdit="AITER_MXFP4",
        needs=(needs.MHA_V4, needs.AITER_BF16),
        flag="has_aiter",
        numerics=Numerics(qk="mxfp4", qk_scales="block", rotated=True, **_FP8_V),  # type: ignore[arg-type]
        dtypes=("bfloat16",),
        head_dims=(128,),
    ),
    # 1836
    "AITER_SAGE_V2": Backend(
        xdit="AITER_SAGE_V2",
        needs=(needs.AITER_SAGE_V2, needs.AITER_BF16),
        flag="has_aiter",
        numerics=Numerics(qk="mxfp4", qk_scales="block", rotated=True, smoothed=True, ties="away", **_FP8_V),  # type: ignore[arg-type]
    ),
    "FLASH_3": Backend(xdit="FLASH_3", needs=(needs.FLASH_3,), flag="has_flash_attn_3", lse=True),
    # Probabilities are in [0, 2^8]: `Max_offset` of FlashAttention 3's forward kernel.
    "FLASH_3_FP8": Backend(
        xdit="FLASH_3_FP8",
        needs=(needs.FLASH_3,),
        flag="has_flash_attn_3",
        numerics=Numerics(largest=256.0, **_PER_TENSOR),  # type: ignore[arg-type]
    ),
    "FLASH_4": Backend(xdit="FLASH_4", needs=(needs.FLASH_4,), flag="has_flash_attn_4"),
    "FLASH_4_FP4": Backend(
        xdit="FLASH_4_FP4",
        needs=(needs.FLASH_4_FP4, needs.FLASHINFER),
        flag="has_flash_attn_4_fp4",
        numerics=Numerics(qk="nvfp4", qk_scales="block"),
    ),
    "FLASH": Backend(xdit="FLASH", needs=(needs.FLASH_2,), flag="has_flash_attn", lse=True),
    "CUDNN": Backend(xdit="CUDNN", cudnn=True, lse=True),
    # SageAttention has a scale per group of a thread's tokens, the reference per warp. Probabilities go up to E4M3's 448.
    "SAGE": Backend(
        xdit="SAGE",
        needs=(needs.SAGE,),
        flag="has_sage",
        numerics=Numerics(qk="int8", qk_scales="tokens", groups=(16, 128), smoothed=True, largest=448.0, **_FP8_V),  # type: ignore[arg-type]
    ),
    "SAGE_FP16": Backend(
        xdit="SAGE",
        needs=(needs.SAGE,),
        flag="has_sage",
        numerics=Numerics(qk="int8", qk_scales="tokens", groups=(32, 64), smoothed=True, v="fp16", probabilities="fp16"),
    ),
}

# Name in a recipe -> architecture -> keys of ATTENTION, best first; "gpu" is any other NVIDIA or AMD GPU. Not here:
# - On gfx942 MHA v4, with which xDiT replaces AITER_FP8, has a kernel for INT8 only (hsa/gfx942/fmha_v4_fwd).
# - FlashAttention 3 is Hopper's alone; SageAttention 2 has no kernel for sm100 and sm103; FlashAttention 4's FP4 is theirs alone.
# - NVTE_FP8 takes its scales from what TransformerEngine saw in earlier calls, that is, in earlier queries.
_NVIDIA = ("CUDNN", "FLASH", "SDPA")
CANDIDATES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "sdpa": {
        "gfx950": ("AITER", "FLASH", "SDPA"),
        "gfx942": ("AITER", "FLASH", "SDPA"),
        "sm90": ("FLASH_3", *_NVIDIA),
        "sm100": ("FLASH_4", *_NVIDIA),
        "sm103": ("FLASH_4", *_NVIDIA),
        "sm120": _NVIDIA,
        "gpu": ("FLASH", "SDPA"),
        "cpu": ("SDPA",),
    },
    "sage_fp8": {
        "gfx950": ("AITER_FP8", "AITER_FP8_V3", "AITER_SAGE"),
        "gfx942": ("AITER_FP8_V3", "AITER_SAGE"),
        "sm90": ("FLASH_3_FP8", "SAGE"),
        "sm89": ("SAGE",),
        "sm120": ("SAGE",),
        "sm80": ("SAGE_FP16",),
        "sm86": ("SAGE_FP16",),
    },
    "sage_fp4": {
        "gfx950": ("AITER_MXFP4", "AITER_SAGE_V2"),
        "sm100": ("FLASH_4_FP4",),
        "sm103": ("FLASH_4_FP4",),
    },
}

# What a name needs, for the message when none of it is installed.
_AITER = "AITER (in the container rocm/pytorch-xdit; PyPI's amd-aiter is older, its aiter another package)"
NEEDS: Mapping[str, str] = {
    "sdpa": "PyTorch",
    "sage_fp8": f"{_AITER} on gfx950 or gfx942, FlashAttention 3 on sm90, or SageAttention 2 on sm80 to sm90 and sm120",
    "sage_fp4": f"{_AITER} on gfx950, or FlashAttention 4 with FP4 on sm100 or sm103",
    "fp8": "torchao's float8 on a GPU with FP8: gfx950, gfx942, sm89 or newer",
    "mxfp4": f"{_AITER} on gfx950, or torchao's MX formats on sm100 or sm103",
}


@dataclass(frozen=True, kw_only=True)
class GemmBackend:
    """A way to multiply in one format. The numerics follow from the format (`numerics.gemm_text`)."""

    needs: tuple[Need, ...] = ()
    dtypes: tuple[str, ...] = ("bfloat16",)


GEMM: Mapping[str, GemmBackend] = {
    "TORCH": GemmBackend(dtypes=(*HALF, "float32")),
    "AITER_A4W4": GemmBackend(needs=(needs.A4W4, needs.SHUFFLE)),  # behind xDiT's xFuserMXFP4Linear; returns bf16
    "TORCHAO_FP8": GemmBackend(needs=(needs.TORCHAO_FP8,)),
    "TORCHAO_MXFP4": GemmBackend(needs=(needs.TORCHAO_MX, needs.SCALED_MM)),
}
# Format of a recipe -> architecture -> key of GEMM; "any" is every device.
GEMM_CANDIDATES: Mapping[str, Mapping[str, str]] = {
    "bf16": {"any": "TORCH"},
    "fp8": dict.fromkeys(("gfx950", "gfx942", "sm89", "sm90", "sm100", "sm103", "sm120"), "TORCHAO_FP8"),
    "mxfp4": {"gfx950": "AITER_A4W4", "sm100": "TORCHAO_MXFP4", "sm103": "TORCHAO_MXFP4"},
}
ARCHS = ("gfx950", "gfx942", "sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120")
