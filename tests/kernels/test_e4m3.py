"""What `exchange: fp8` makes of Q, K and V, against all numbers that E4M3 has."""

from __future__ import annotations

import pytest
import torch

from wan_mlperf.kernels.e4m3 import as_sent, missing, pack, unpack

TOKENS, DIM = 33, 32


def heads(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[B, H, T, D], heads of very different sizes; one is zero."""
    values = torch.randn(2, 4, TOKENS, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = torch.tensor([1.0, 3e-5, 4.4e7, 0.0], dtype=torch.float64).view(1, 4, 1, 1)
    values *= sizes if dtype != torch.float16 else sizes.clamp(max=1e3)
    return values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_value_becomes_the_nearest_number_that_a_byte_can_be(dtype: torch.dtype) -> None:
    x = heads(dtype)
    packed = pack(x)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 4, TOKENS + 1, DIM)
    got = unpack(packed, dtype)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = codes[codes.isfinite()].unique()
    for sample in range(2):
        for head in range(4):
            own, amax = x[sample, head].double(), x[sample, head].double().abs().max()
            scale = 2.0 ** torch.ceil(torch.log2(amax / 448)) if amax else torch.tensor(1.0).double()
            nearest = (own.unsqueeze(-1) / scale - numbers).abs().min(-1).values
            assert torch.equal((got[sample, head].double() - own).abs() / scale, nearest), (sample, head)
    assert torch.equal(unpack(pack(got), dtype), got)  # a second exchange, as behind a ring, rounds nothing


def test_the_error_is_that_of_three_bits() -> None:
    x = heads()[:, :1]
    error = float((unpack(pack(x), torch.float32) - x).norm() / x.norm())
    # Of one value 2^-4 / sqrt(3) at the lower end of a binade, and half of that at its upper end.
    assert 0.02 < error < 0.03


@pytest.mark.parametrize(("bad", "kept"), [(float("nan"), True), (float("inf"), False)])
def test_what_is_not_a_number_stays_so(bad: float, kept: bool) -> None:
    """It must not become a plausible value: a broken weight is seen in the video, and in its own sample and head only."""
    x = heads()
    x[0, 1, 5, 7] = bad
    got = unpack(pack(x), torch.float32)
    assert got[0, 1, 5, 7].isnan()
    clean = torch.ones(2, 4, dtype=torch.bool)
    clean[0, 1] = False
    assert got[clean].isfinite().all()


def test_a_share_of_the_tokens_rounds_as_all_of_them() -> None:
    """Whatever the number of ranks: a power of two moves only what lies below the normal numbers of the largest scale."""
    x = heads(torch.bfloat16)
    one = as_sent(x, 1)
    for ranks in (2, 4, 8, 40):  # none divides 33 tokens; 40 are more than there are
        got = as_sent(x, ranks)
        assert got.shape == x.shape and got.dtype == x.dtype
        normal = x.abs() >= x.abs().amax((-2, -1), keepdim=True) * 2.0**-14
        assert torch.equal(got[normal], one[normal])
        assert (got - one).abs().max() <= (x.abs().amax() * 2.0**-17)


def test_where_it_cannot_be_compiled() -> None:
    assert missing("sm80", compiled=True) and not missing("sm80", compiled=False)
    assert not any(missing(arch, compiled=True) for arch in ("gfx950", "gfx942", "sm89", "sm90", "sm100", "cpu"))
