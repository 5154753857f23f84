"""The text's padding in cross-attention: all tokens, a bias and a merge are the same; and which kernel may do which."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import SMALL
from wan_mlperf import Pipeline, load_recipe
from wan_mlperf.experts import TextKeys
from wan_mlperf.kernels import attention, padding
from wan_mlperf.kernels.attention import Kernel, sdpa_with_lse
from wan_mlperf.kernels.backends import ATTENTION
from wan_mlperf.kernels.device import Device, probe
from wan_mlperf.kernels.padding import Padding
from wan_mlperf.parallel import mesh, split_experts

CPU = Device(arch="cpu", name="test", torch=torch.device("cpu"))
FULL = 96


def text(lengths: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A query, and a text's keys and values whose padding tokens are all equal, [B, H, T or S, D]."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(len(lengths), 3, count, 32, generator=generator) for count in (50, FULL, FULL))
    for index, length in enumerate(lengths):
        key[index, :, length:], value[index, :, length:] = 1.5 * key[0, :, -1:], 3 * value[0, :, -1:]
    return query.to(dtype), key.to(dtype), value.to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("lengths", [(1,), (17,), (64,), (95,), (FULL,), (5, 70), (64, FULL)])
def test_a_bias_and_a_merge_give_what_all_tokens_give(
    lengths: tuple[int, ...], rounded: bool, dtype: torch.dtype, tolerance: float
) -> None:
    query, key, value = text(lengths, dtype)
    whole = F.scaled_dot_product_attention(query.double(), key.double(), value.double())

    count = padding.kept(lengths, FULL, merged=False, rounded=rounded)
    bias = padding.bias(lengths, FULL, count, CPU.torch).to(dtype)
    biased = F.scaled_dot_product_attention(query, key[:, :, :count], value[:, :, :count], attn_mask=bias)

    count = padding.kept(lengths, FULL, merged=True, rounded=rounded)
    assert max(lengths) <= count <= FULL and (not rounded or count in (64, FULL))
    out, lse = sdpa_with_lse(query, key[:, :, :count], value[:, :, :count])
    last = min(count, FULL - 1)
    rest = Padding(key[:, :, last : last + 1], value[:, :, last : last + 1], padding.log_count(FULL, count, CPU.torch))
    merged = padding.merge(out, lse, query, rest)
    assert merged.dtype == dtype
    for one in (biased, merged):
        assert float((one.double() - whole).norm() / whole.norm()) < tolerance


def test_few_lengths_are_left() -> None:
    for merged in (False, True):
        counts = {padding.kept((length,), 512, merged=merged, rounded=True) for length in range(1, 513)}
        assert counts == set(padding.LENGTHS)


@pytest.fixture
def groups() -> None:
    mesh.start(mesh.Shape(replicas=1, cfg=1, ulysses=1, ring=1), probe())


def test_a_bias_reaches_only_what_reads_it(groups: None) -> None:
    """xDiT's own function of every other backend would ignore it without a word."""
    query, key, value = text((17,), torch.float32)
    bias = padding.bias((17,), FULL, 18, CPU.torch)
    biased = TextKeys(key[:, :, :18], value[:, :, :18], bias)
    whole = F.scaled_dot_product_attention(query, key, value)
    for backend in ATTENTION:
        kernel = attention._kernel(backend)
        _, cross_attend = split_experts.attends({"cross": kernel})
        if kernel.bias:
            assert backend == "SDPA" and torch.allclose(cross_attend(query, biased), whole, atol=1e-5)
        else:
            with pytest.raises(AssertionError, match=f"{backend} reads no bias"):
                cross_attend(query, biased)
    _, cross_attend = split_experts.attends({"cross": Kernel(backend="SDPA", function=sdpa_with_lse, lse=True)})
    with pytest.raises(AssertionError, match="reads no bias"):
        cross_attend(query, biased)


def test_what_is_merged_needs_a_log_sum_exp(groups: None) -> None:
    query, key, value = text((17,), torch.float32)
    rest = TextKeys(key[:, :, :17], value[:, :, :17], padding=Padding(key[:, :, -1:], value[:, :, -1:], torch.tensor(0.0)))
    _, cross_attend = split_experts.attends({"cross": attention._kernel("SDPA")})
    with pytest.raises(AssertionError, match="gives no log-sum-exp"):
        cross_attend(query, rest)


@pytest.mark.parametrize("trim_text", [True, False])
def test_the_recipes_two_ways_make_the_same_latents(trim_text: bool, model: Path) -> None:
    """In fp32 and without quantisation, so that only rounding is left."""
    plain = [one.removeprefix("--set=") for one in SMALL]
    plain += ["attention.early=sdpa", "attention.late=sdpa", "gemm.high_noise=bf16", "gemm.low_noise=bf16", "model.dtype=float32"]
    plain += [f"model.checkpoint={model}", "mesh.ranks=1", f"trim_text={str(trim_text).lower()}"]
    made = {}
    for cross in ("sdpa", "native"):
        pipeline = Pipeline.load(load_recipe("tiny", overrides=[*plain, f"attention.cross={cross}"]))
        kernel = pipeline.kernels["cross"]
        assert kernel.backend == "SDPA" and kernel.lse == (cross == "native" and trim_text)
        made[cross] = pipeline.latents(["a red circle", "a blue square that moves to the left"])
    assert float((made["native"] - made["sdpa"]).norm() / made["sdpa"].norm()) < 1e-5
    assert not torch.equal(made["native"], made["sdpa"]) or not trim_text
