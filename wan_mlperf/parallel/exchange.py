"""What the ranks of a replica send each other while they work: the decode's edges, keys and values; the branches of guidance.

With a GPU or several hosts, tensors go over the process group. On the CPU of one host they go through shared memory, because
gloo handles each message in a separate thread on either side, and on busy cores each of these threads waits for its turn. Two
ranks on two cores needed 1.2 ms for edges of about 20 KB over gloo and 0.1 ms this way, fifty times per video.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist

from wan_mlperf.ranks import node

Received = Callable[[], dict[int, torch.Tensor]]
SLOTS = 2  # a rank that has received the next tensor no longer needs the one before: see `SharedMemoryExchange`


class Exchange(Protocol):
    """Sends tensors to other ranks of the replica and receives theirs, by rank in the replica. All call it in the same order."""

    def start(self, tensors: Mapping[int, torch.Tensor]) -> Received:
        """Send each rank its contiguous tensor. Call the result to wait for a tensor of the same shape from each of them."""

    def close(self) -> None:
        """Release files and memory."""


class ProcessGroupExchange:
    """Exchanges by sends and receives of the process group, which run in parallel with the device's work."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._ranks = dist.get_process_group_ranks(group)

    def start(self, tensors: Mapping[int, torch.Tensor]) -> Received:
        """See `Exchange.start`."""
        received = {rank: torch.empty_like(tensor) for rank, tensor in tensors.items()}
        operations = []
        for rank, tensor in tensors.items():
            operations += [
                dist.P2POp(dist.isend, tensor, self._ranks[rank], group=self._group),
                dist.P2POp(dist.irecv, received[rank], self._ranks[rank], group=self._group),
            ]
        under_way = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> dict[int, torch.Tensor]:
            for work in under_way:
                work.wait()
            return received

        return wait

    def close(self) -> None:
        """Nothing to do: the group belongs to the mesh."""


Address = tuple[int, list[int], int]  # process, slots, pipe


class _Inbox:
    """Where one other rank's tensors arrive: memory for two of them, and a pipe that carries one byte for each new tensor.

    Neither has a name, so a killed process leaves nothing behind. The memory is read and written as a file: it grows as needed.
    """

    def __init__(self, sender: int) -> None:
        self.sender = sender
        self._slots = [os.fdopen(os.memfd_create("wan_mlperf-exchange"), "r+b", buffering=0) for _ in range(SLOTS)]
        ready, filled = os.pipe()
        self._ready, self._filled = os.fdopen(ready, "rb", buffering=0), os.fdopen(filled, "wb", buffering=0)
        self._until_ready = select.poll()
        self._until_ready.register(ready, select.POLLIN)
        self._count = 0

    @property
    def address(self) -> Address:
        """What `_Outbox` needs."""
        return os.getpid(), [slot.fileno() for slot in self._slots], self._filled.fileno()

    def only_the_sender_writes(self) -> None:
        """Close our copy of the writing end. The pipe then breaks when the sender dies, and nobody waits for a dead rank."""
        self._filled.close()

    def receive(self, like: torch.Tensor, timeout_s: float) -> torch.Tensor:
        """Wait for the sender's next tensor, which has the shape and dtype of `like`."""
        if not self._until_ready.poll(timeout_s * 1e3):
            raise TimeoutError(f"the connection was silent: nothing from rank {self.sender} of the replica in {timeout_s:.0f} s")
        if not self._ready.read(1):
            raise ConnectionError(f"connection closed by rank {self.sender} of the replica")
        tensor = torch.empty_like(like)
        slot, wanted, done = self._slots[self._count % SLOTS].fileno(), _bytes(tensor), 0
        while done < len(wanted):  # one call moves 2 GiB at most
            size = os.preadv(slot, [wanted[done:]], done)
            assert size, f"rank {self.sender} of the replica sent {done} bytes, expected {tensor.nbytes}"
            done += size
        self._count += 1
        return tensor

    def close(self) -> None:
        """Close the files."""
        for file in (*self._slots, self._ready, self._filled):
            file.close()


class _Outbox:
    """The sender's end of another rank's inbox."""

    def __init__(self, address: Address) -> None:
        process, slots, filled = address
        self._slots = [open(f"/proc/{process}/fd/{slot}", "r+b", buffering=0) for slot in slots]  # noqa: SIM115
        self._filled = open(f"/proc/{process}/fd/{filled}", "wb", buffering=0)  # noqa: SIM115
        self._count = 0

    def send(self, tensor: torch.Tensor) -> None:
        """Write into the slot whose previous tensor the receiver has already read."""
        slot, content, done = self._slots[self._count % SLOTS].fileno(), _bytes(tensor), 0
        try:
            while done < len(content):
                done += os.pwritev(slot, [content[done:]], done)
        except OSError as error:  # "File too large" is `ulimit -f`, which counts this memory as a file
            what = f"the memory that ranks share ({tensor.nbytes} bytes; mesh.ranks=1 needs none)"
            raise OSError(error.errno, error.strerror, what) from None
        self._filled.write(b"\1")
        self._count += 1

    def close(self) -> None:
        """Close the files: a receiver that is waiting notices."""
        for file in (*self._slots, self._filled):
            file.close()


class SharedMemoryExchange:
    """Exchanges through shared memory, for ranks of one host without a GPU. All ranks of the replica make one together.

    Two slots are enough, because every exchange goes both ways: a rank that sends tensor n + 2 has received the other's tensor
    n + 1, which the other sent after it had received n.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        own, size = dist.get_rank(group), dist.get_world_size(group)
        self._inboxes = {rank: _Inbox(rank) for rank in range(size) if rank != own}
        addresses: list[dict[int, Address]] = [{}] * size
        dist.all_gather_object(addresses, {rank: inbox.address for rank, inbox in self._inboxes.items()}, group=group)
        self._outboxes = {rank: _Outbox(addresses[rank][own]) for rank in self._inboxes}
        dist.barrier(group)
        for inbox in self._inboxes.values():
            inbox.only_the_sender_writes()

    @torch.compiler.disable
    def start(self, tensors: Mapping[int, torch.Tensor]) -> Received:
        """See `Exchange.start`."""
        for rank, tensor in tensors.items():
            self._outboxes[rank].send(tensor)
        return partial(self._receive, tensors)

    @torch.compiler.disable
    def _receive(self, likes: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        return {rank: self._inboxes[rank].receive(like, self._timeout_s) for rank, like in likes.items()}

    def close(self) -> None:
        """Close inboxes and outboxes."""
        for inbox in self._inboxes.values():
            inbox.close()
        for outbox in self._outboxes.values():
            outbox.close()


def connect(group: dist.ProcessGroup, *, is_gpu: bool, timeout_s: float) -> Exchange:
    """Return the exchange for a replica's group. Every rank of the group calls it."""
    if is_gpu:
        return ProcessGroupExchange(group)
    nodes = [""] * dist.get_world_size(group)
    dist.all_gather_object(nodes, node(), group=group)
    return SharedMemoryExchange(group, timeout_s) if len(set(nodes)) == 1 else ProcessGroupExchange(group)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    assert tensor.is_contiguous()
    return tensor.view(-1).view(torch.uint8).numpy().data
