"""Tensors that ranks of a replica send each other: the same through memory as over gloo, and the death of a rank is noticed."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from wan_mlperf.parallel import exchange

RANKS = 3
SHAPES = [(1, 4, 2, 3), (2, 96, 3, 1, 7), (5,), (1, 64, 16, 320), (1,)]  # the fourth is larger than a pipe or a socket buffers


def tensors(rank: int, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rank + number)
    return torch.randn(SHAPES[number % len(SHAPES)], generator=generator).to((torch.float32, torch.bfloat16)[number % 2])


def join() -> tuple[int, dist.ProcessGroup]:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    assert dist.group.WORLD is not None
    return dist.get_rank(), dist.group.WORLD


def hand_around(_folder: Path) -> None:
    """Each with its neighbours in a row, of which the ends have one, then the ends with each other; the middle is slow."""
    rank, group = join()
    ways = [exchange.connect(group, is_gpu=False, timeout_s=60), exchange.ProcessGroupExchange(group)]
    assert isinstance(ways[0], exchange.SharedMemoryExchange)
    for number in range(20):
        if rank == 1:
            time.sleep(0.01)
        for others in ([rank - 1, rank + 1], [2 - rank] if rank != 1 else []):
            partners = [other for other in others if 0 <= other < RANKS]
            for way in ways:
                received = way.start({partner: tensors(rank, number) for partner in partners})()
                assert list(received) == partners
                for partner, tensor in received.items():
                    expected = tensors(partner, number)
                    assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    for way in ways:
        way.close()
    dist.destroy_process_group()


def lose_a_rank(folder: Path) -> None:
    rank, group = join()
    memory = exchange.connect(group, is_gpu=False, timeout_s=0.5 if rank == 0 else 60)
    noticed = Path(folder, "noticed")
    if rank == 2:
        memory.start({1: tensors(2, 0)})
        os._exit(0)
    partner = {0: 1, 1: 2}[rank]
    received = memory.start({partner: tensors(rank, 0)})
    if rank == 0:
        with pytest.raises(TimeoutError, match="nothing from rank 1 of the replica in"):
            received()
        noticed.touch()
    else:
        assert torch.equal(received()[2], tensors(2, 0))  # sent before the end
        with pytest.raises(ConnectionError, match=r"closed by rank 2|Broken pipe"):
            memory.start({2: tensors(1, 1)})()
        while not noticed.exists():  # silent, but there
            time.sleep(0.01)
    os._exit(0)  # without its third rank the group cannot end in order


@pytest.mark.job
@pytest.mark.parametrize("job", [hand_around, lose_a_rank])
def test_exchange(job: Callable[[Path], None], tmp_path: Path) -> None:
    run_ranks(job, tmp_path, ranks=RANKS)
