"""What a kernel does to its operands, in one place. The references compute it, and every document about a run quotes its text.

Does not import torch, because the submission's documents, the report and the host check read it, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["16 bits", "fp16", "int8", "fp8", "mxfp4", "nvfp4"]
Scales = Literal["none", "tensor", "tokens", "channel", "block"]

FORMATS: dict[str, str] = {
    "16 bits": "16 bits",
    "fp16": "FP16",
    "int8": "INT8",
    "fp8": "FP8 E4M3",
    "mxfp4": "MXFP4 (E2M1)",
    "nvfp4": "NVFP4 (E2M1)",
}
SCALES: dict[tuple[str, str], str] = {
    ("int8", "tokens"): "one scale per group of tokens of a head",
    ("fp8", "tensor"): "one scale per tensor, that is, over all tokens of the heads that a GPU holds",
    ("fp8", "channel"): "one scale per channel of a head",
    ("mxfp4", "block"): "one E8M0 scale per 32 values of the head dimension, rounded up to a power of two",
    ("nvfp4", "block"): "one E4M3 scale per 16 values of the head dimension",
}


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """An attention kernel's arithmetic: the formats of Q, K and V in the products, and of the probabilities multiplied with V.

    `rotated`: Q and K are multiplied by a Hadamard matrix along the head dimension, which does not change Q K^T and spreads
    outliers. `smoothed`: K minus its mean over the tokens, which does not change the softmax (SageAttention). `groups`: how many
    tokens of Q and of K share a scale. `largest`: the largest probability before rounding. `ties`: the FP4 code for a value
    half-way between two of them.
    """

    qk: Format = "16 bits"
    qk_scales: Scales = "none"
    rotated: bool = False
    smoothed: bool = False
    v: Format = "16 bits"
    v_scales: Scales = "none"
    probabilities: Format = "16 bits"
    largest: float = 1.0
    groups: tuple[int, int] = (0, 0)
    ties: Literal["even", "away"] = "even"

    @property
    def text(self) -> str:
        """Describe it in one phrase."""
        if self == SIXTEEN_BITS:
            return "Q, K and V in the dtype that the model computes in, not quantised"
        parts = ["Q and K " + ("rotated by a Hadamard matrix" if self.rotated else "not rotated")]
        parts.append("K minus its mean over the tokens (smoothed)" if self.smoothed else "K not smoothed")
        parts.append("Q and K in " + _operand(self.qk, self.qk_scales))
        parts.append("V in " + _operand(self.v, self.v_scales))
        parts.append(f"probabilities in {FORMATS[self.probabilities]}")
        return "; ".join(parts)


SIXTEEN_BITS = Numerics()


def _operand(name: str, scales: str) -> str:
    return FORMATS[name] + (f" with {SCALES[name, scales]}" if scales != "none" else "")


# Linear layers: format and granularity -> its text. Weights are quantised once, when they are loaded.
GEMM_TEXTS: dict[tuple[str, str], str] = {
    ("bf16", ""): "the dtype that the model computes in, not quantised",
    (
        "fp8",
        "row",
    ): "FP8 E4M3 with one scale per row of the weight and one per token, computed from the values themselves: weights "
    "once when they are loaded, activations in every call",
    ("fp8", "tensor"): "FP8 E4M3 with one scale per weight and one per activation tensor, computed from the values themselves: "
    "weights once when they are loaded, activations in every call",
    (
        "mxfp4",
        "",
    ): "MXFP4 (E2M1, one E8M0 scale per 32 values along the reduced dimension, rounded up to a power of two): weights "
    "once when they are loaded, activations in every call",
}


def gemm_text(name: str, fp8_scales: str = "row") -> str:
    """Describe a format of linear layers. `fp8_scales` is the recipe's."""
    return GEMM_TEXTS[name, fp8_scales if name == "fp8" else ""]


# Q, K and V on their way between the ranks that share a video's tokens, by the recipe's `exchange`.
EXCHANGE_TEXTS: dict[str, str] = {
    "bf16": "Q, K and V in the dtype that the model computes in, not quantised",
    "fp8": "Q, K and V as FP8 E4M3 with one scale, a power of two, per sample, head and sending rank, computed from the values "
    "themselves in every call; the attention's output in the dtype that the model computes in",
}
NOTHING_EXCHANGED = "none: each rank has all tokens of its video, so that Q, K and V are neither sent nor rounded"


def exchange_text(name: str, ranks: int) -> str:
    """Describe what ranks send each other for attention; `ranks` is how many share a video's tokens."""
    return EXCHANGE_TEXTS[name] if ranks > 1 else NOTHING_EXCHANGED
