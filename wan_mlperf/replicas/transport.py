"""How a sample's content reaches rank 0: as memory on one host, over the process group between hosts.

On one host the sender fills an anonymous file in memory and the receiver maps it through /proc. The receiver does not copy, a
killed process leaves no name behind, and /dev/shm, which has 64 MB in many containers, is not used.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from wan_mlperf import ranks
from wan_mlperf.errors import Failed
from wan_mlperf.replicas.messages import Done

Content = np.ndarray | bytes


def shares_host_with_first(group: dist.ProcessGroup | None) -> bool:
    """True if rank 0 is on this rank's host and can map its memory. Every rank of the group calls it."""
    first = [ranks.node()]
    dist.broadcast_object_list(first, src=0, group=group)
    return first[0] == ranks.node()


@contextmanager
def memory(content: Content) -> Iterator[int]:
    """Yield the descriptor of an anonymous file in memory with `content`."""
    flat = _bytes(content)
    descriptor = os.memfd_create("wan_mlperf-sample")
    try:
        os.ftruncate(descriptor, max(1, flat.nbytes))
        with mmap.mmap(descriptor, max(1, flat.nbytes)) as area:
            np.frombuffer(area, np.uint8, flat.nbytes)[:] = flat
        yield descriptor
    finally:
        os.close(descriptor)


def send(content: Content, group: dist.ProcessGroup | None) -> None:
    """Send to rank 0 over the group. Returns when it has arrived."""
    dist.send(torch.from_numpy(_bytes(content)), dst=0, group=group)


def receive(done: Done, group: dist.ProcessGroup | None) -> np.ndarray:
    """Rank 0: return the content that `done` announces, uint8 [size]."""
    if done.descriptor is None:
        buffer = torch.empty(done.size, dtype=torch.uint8)
        dist.recv(buffer, src=done.rank, group=group)
        return buffer.numpy()
    try:
        with open(f"/proc/{done.process}/fd/{done.descriptor}", "rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), max(1, done.size), access=mmap.ACCESS_READ), np.uint8, done.size)
    except OSError as error:
        raise Failed(
            f"the frames of rank {done.rank} cannot be mapped ({error.strerror}): are all ranks in one container?"
        ) from None


def _bytes(content: Content) -> np.ndarray:
    if isinstance(content, bytes):
        return np.frombuffer(bytearray(content), np.uint8)  # a copy: torch wants memory that may be written
    return np.ascontiguousarray(content).reshape(-1).view(np.uint8)
