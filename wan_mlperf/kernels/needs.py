"""What kernels need: packages, and functions in them that take the arguments that xDiT or we pass.

Does not import torch. Dates and pull requests are those of the change that added the function or the argument.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Need:
    """Functions that must be importable. `names[0]` must accept `parameters`, and must not require any of `optional`."""

    package: str
    module: str
    names: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    since: str = ""


# xDiT imports all of these in one statement: one that is missing leaves its AITER_MXFP4 without the function that it calls.
MHA_V4 = Need(
    package="AITER",
    module="aiter.ops.mha_v4",
    names=(
        *("mha_v4", "mha_v4_packed", "mha_v4_q_multiplier", "native_fp8_format", "AttentionFormat", "AttentionScaleMode"),
        *("quantize_fp8", "quantize_mxfp8_k", "quantize_mxfp8_q"),
    ),
    parameters=("q_format", "k_format", "v_format"),
    since="needs AITER from 17 August 2026 (pull 4627)",
)
AITER_BF16 = Need(
    package="AITER",
    module="aiter",
    names=("flash_attn_func", "flash_attn_varlen_func"),
    parameters=("return_lse",),
    since="needs AITER",
)
AITER_FP8 = Need(
    package="AITER",
    module="aiter",
    names=("flash_attn_fp8_pertensor_func", "per_tensor_quant"),
    parameters=("q_descale", "k_descale", "v_descale"),  # without them xDiT computes with a scale of 1: wrong
    since="needs AITER from 28 November 2025 (pull 1459)",
)
AITER_SAGE = Need(
    package="AITER",
    module="aiter.ops.triton.attention.fav3_sage",
    names=("fav3_sage_wrapper_func", "get_sage_fwd_configs"),
    parameters=("layout",),
    since="needs AITER from 24 February 2026 (pull 2066)",
)
AITER_SAGE_V2 = Need(
    package="AITER",
    module="aiter.ops.triton.attention.fav3_sage_attention_mxfp4_wrapper",
    names=("fav3_sage_mxfp4_wrapper", "get_sage_fwd_configs_mxfp4"),
    parameters=("layout", "hadamard_rotation", "R"),
    since="needs AITER from 24 February 2026 (pull 2066)",
)
FLASH_3 = Need(
    package="FlashAttention 3",
    module="flash_attn_interface",
    names=("flash_attn_func", "flash_attn_varlen_func"),
    parameters=("return_attn_probs", "q_descale", "k_descale", "v_descale"),
    since="needs FlashAttention 3 (hopper/ of Dao-AILab/flash-attention) from 29 August 2025 (pull 1851)",
)
FLASH_4 = Need(
    package="FlashAttention 4",
    module="flash_attn.cute.interface",
    names=("flash_attn_func", "flash_attn_varlen_func"),
    parameters=("causal",),
    since="needs flash_attn.cute of Dao-AILab/flash-attention",
)
FLASH_4_FP4 = Need(
    package="FlashAttention 4 with FP4",
    module="flash_attn.cute.interface",
    names=("flash_attn_func",),
    parameters=("causal", "mSFQ", "mSFK"),
    since="needs the fork hao-ai-lab/flash-attention-fp4",
)
FLASH_2 = Need(
    package="FlashAttention 2",
    module="flash_attn",
    names=("flash_attn_func", "flash_attn_varlen_func"),
    parameters=("dropout_p", "causal", "return_attn_probs"),
    since="needs flash-attn 2.6 or newer",
)
FLASHINFER = Need(
    package="FlashInfer",
    module="flashinfer.quantization",
    names=("nvfp4_quantize", "SfLayout"),
    parameters=("sfLayout", "do_shuffle"),
    since="needs flashinfer-python",
)
SAGE = Need(
    package="SageAttention",
    module="sageattention",
    names=("sageattn",),
    parameters=("is_causal", "return_lse"),
    since="needs SageAttention 2 (thu-ml/SageAttention); PyPI has 1.0.6",
)
A4W4 = Need(
    package="AITER",
    module="aiter",
    names=("gemm_a4w4", "get_hip_quant", "QuantType"),
    parameters=("bpreshuffle", "bias"),
    optional=("out",),  # xDiT passes none
    since="needs AITER from 19 December 2025 (pull 1679)",
)
SHUFFLE = Need(
    package="AITER",
    module="aiter.ops.shuffle",
    names=("shuffle_weight",),
    parameters=("layout",),
    since="needs AITER",
)
TORCHAO_FP8 = Need(
    package="torchao",
    module="torchao.quantization",
    names=("Float8DynamicActivationFloat8WeightConfig", "PerRow", "PerTensor", "quantize_"),
    parameters=("granularity", "activation_value_lb", "kernel_preference", "set_inductor_config"),
    since="needs torchao 0.18",
)
TORCHAO_MX = Need(
    package="torchao",
    module="torchao.prototype.mx_formats",
    names=("MXDynamicActivationMXWeightConfig",),
    parameters=("activation_dtype", "weight_dtype", "kernel_preference", "scaling_mode"),
    since="needs torchao 0.18",
)
SCALED_MM = Need(
    package="PyTorch",
    module="torch.nn.functional",
    names=("scaled_mm", "ScalingType", "SwizzleType"),
    since="needs torch 2.10 or newer",
)
