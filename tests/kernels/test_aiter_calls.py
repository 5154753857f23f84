"""The references against AITER's own kernels behind xDiT's dispatch, as recorded by tests/aiter (AITER at e4048607, August 2026).

`aiter_calls.safetensors`: fp16 Q, K and V [1, 4, 96, 32], K with a mean; what AITER_SAGE_V2 and AITER_SAGE made of them in
Triton's interpreter; bf16 activations [96, 256] and weights [64, 256] with their product by xDiT's MXFP4 layer. Measured: 1.3 %
for both attention kernels (the interpreter truncates to bf16 where hardware rounds, and rotates in fp16) and 0.3 % for the
product.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from wan_mlperf.kernels.backends import ATTENTION
from wan_mlperf.kernels.linear import Mxfp4Linear
from wan_mlperf.kernels.reference import reference

LIMIT = 0.02


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    return load_file(Path(__file__).with_name("aiter_calls.safetensors"))


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def attention_error(recorded: dict[str, torch.Tensor], name: str, **changed: Any) -> float:
    numerics = dataclasses.replace(ATTENTION[name].numerics, **changed)
    return error(reference(numerics)(recorded["query"], recorded["key"], recorded["value"]), recorded[name])


@pytest.mark.parametrize("name", ["AITER_SAGE_V2", "AITER_SAGE"])
def test_attention_is_aiters(name: str, recorded: dict[str, torch.Tensor]) -> None:
    assert attention_error(recorded, name) < LIMIT


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("AITER_SAGE_V2", {"smoothed": False}),
        ("AITER_SAGE_V2", {"rotated": False}),
        ("AITER_SAGE_V2", {"v_scales": "tensor"}),
        ("AITER_SAGE_V2", {"ties": "even"}),
        ("AITER_SAGE", {"smoothed": False}),
        ("AITER_SAGE", {"rotated": True}),
        ("AITER_SAGE", {"v_scales": "tensor"}),
    ],
)
def test_other_numerics_are_told_apart(name: str, broken: dict[str, Any], recorded: dict[str, torch.Tensor]) -> None:
    assert attention_error(recorded, name, **broken) > 1.2 * LIMIT


def test_the_mxfp4_product_is_aiters(recorded: dict[str, torch.Tensor]) -> None:
    layer = torch.nn.Linear(256, 64, bias=False).bfloat16()
    layer.weight.data = recorded["weight"]
    ours = Mxfp4Linear(layer)
    assert error(ours(recorded["hidden"]), recorded["AITER_A4W4"]) < 0.006
    ours.scales = ours.scales + 1
    assert error(ours(recorded["hidden"]), recorded["AITER_A4W4"]) > 0.5
