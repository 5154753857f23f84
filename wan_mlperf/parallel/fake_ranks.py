"""One rank of any mesh in one process, without the others: torch's "fake" process group under xDiT's own groups.

Collectives return at once and move nothing, so only shapes, bytes and messages mean anything. For rehearsals (predict/).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from wan_mlperf.kernels.device import Device
from wan_mlperf.parallel import xdit_groups
from wan_mlperf.parallel.exchange import Exchange, ProcessGroupExchange
from wan_mlperf.parallel.mesh import Mesh, Shape


@contextmanager
def fake_mesh(shape: Shape, device: Device, rank: int, *, unguided: bool = False) -> Iterator[Mesh]:
    """Yield the mesh that `rank` of `shape` would have. The process must have no process group; afterwards it has none."""
    assert not dist.is_initialized(), "a rehearsal needs a process without a process group"
    fake = importlib.import_module("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=rank, world_size=shape.world)
    try:
        with _every_group_is_fake():
            distributed = xdit_groups.start_groups(
                device,
                replicas=shape.replicas,
                cfg=shape.cfg,
                ulysses=shape.ulysses,
                ring=shape.ring,
                timeout_s=60.0,
            )
            unguided_groups = None
            if unguided and shape.cfg == 2:
                degrees = {"ulysses": 2 * shape.ulysses, "ring": shape.ring}
                unguided_groups = xdit_groups.make_sequence_groups(
                    device, **degrees, rank=rank, world=shape.world, timeout_s=60.0
                )
        exchange: Exchange | None = None
        if shape.per_replica > 1:
            exchange = ProcessGroupExchange(distributed.get_vae_parallel_group().device_group)
        yield Mesh(shape, device, rank, distributed, exchange, unguided_groups)
    finally:
        xdit_groups.stop_groups()
        dist.destroy_process_group()


def has_group() -> bool:
    """True if this process has a process group, in which case it cannot have a fake one."""
    return dist.is_initialized()


class Group(NamedTuple):
    """What a process group is to us (ulysses, ring, sequence, replica), and how many ranks it has."""

    what: str
    size: int


def groups_of(mesh: Mesh) -> dict[str, Group]:
    """Torch's name of a group -> the group, for those that a video's ranks use."""
    process_groups = importlib.import_module("yunchang.globals").PROCESS_GROUP
    distributed = importlib.import_module("xfuser.core.distributed")
    named = {
        "replica": [distributed.get_model_replica_group().device_group, distributed.get_vae_parallel_group().device_group],
        "sequence": [distributed.get_sp_group().device_group],
        "ring": [process_groups.RING_PG],
        "ulysses": [process_groups.ULYSSES_PG],
    }
    if mesh.unguided_groups is not None:
        named["sequence"].append(mesh.unguided_groups.coordinator.device_group)
        named["ulysses"].append(mesh.unguided_groups.ulysses)
    return {one.group_name: Group(what, one.size()) for what, those in named.items() for one in those if one is not None}


def group_name(args: Sequence[object], kwargs: Mapping[str, object]) -> str | None:
    """Name of the group that a collective was called with: functional ones get the name, others a process group."""
    for one in (*args, *kwargs.values()):
        if isinstance(one, str) and one not in ("sum", "avg"):
            return one
        if isinstance(one, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(one).group_name
            except (RuntimeError, TypeError):  # another object, such as the reduction
                continue
    return None


@contextmanager
def _every_group_is_fake() -> Iterator[None]:
    # xDiT names gloo or nccl for each of its groups; torch has no option that overrides it.
    real: Any = dist.new_group

    def new_group(ranks: Any = None, *_: Any, **options: Any) -> Any:
        return real(ranks, backend="fake", timeout=options.get("timeout"))

    dist.new_group = new_group
    try:
        yield
    finally:
        dist.new_group = real
