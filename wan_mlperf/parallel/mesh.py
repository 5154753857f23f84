"""torchrun's environment -> xDiT's groups: replica, CFG, Ulysses (x ring), VAE.

Ranks are ordered as in xDiT: sequence parallel innermost, then CFG, then replicas. So the ranks of a replica are consecutive and
stay on one host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

import torch
import torch.distributed as dist

from wan_mlperf import ranks
from wan_mlperf.errors import BadInput
from wan_mlperf.kernels.device import VISIBLE, Device, Fabric, build, gpu_count, visible_by
from wan_mlperf.parallel import xdit_groups
from wan_mlperf.parallel.exchange import Exchange, connect
from wan_mlperf.recipe import MeshRecipe

T = TypeVar("T")
ERROR_BYTES = 512  # of the error text that a rank sends to its replica's first rank
CPU_RANKS = 2  # what `mesh.ranks: auto` starts without a GPU


@dataclass(frozen=True, kw_only=True)
class Shape:
    """world = replicas x cfg x ulysses x ring."""

    replicas: int
    cfg: int
    ulysses: int
    ring: int

    @property
    def world(self) -> int:
        """Number of ranks in all."""
        return self.replicas * self.per_replica

    @property
    def per_replica(self) -> int:
        """Number of ranks that make one video."""
        return self.cfg * self.ulysses * self.ring

    def sharing(self, *, unguided: bool = False) -> int:
        """How many ranks share a video's tokens in attention; `unguided`: if there are steps without guidance, in those."""
        return self.per_replica if unguided else self.ulysses * self.ring

    def __str__(self) -> str:
        ring = f" x ring {self.ring}" if self.ring > 1 else ""
        return f"{self.replicas} replica{'s' if self.replicas > 1 else ''} x CFG {self.cfg} x Ulysses {self.ulysses}{ring}"


def ranks_to_start(mesh: MeshRecipe) -> int:
    """How many ranks to start on this host for this recipe, where the user has not started torchrun."""
    if mesh.ranks != "auto":
        return mesh.ranks
    fixed = [mesh.replicas, mesh.cfg, mesh.ulysses]
    if all(isinstance(one, int) for one in fixed):
        return Shape(replicas=fixed[0], cfg=fixed[1], ulysses=fixed[2], ring=mesh.ring).world  # type: ignore[arg-type]
    return gpu_count() or CPU_RANKS


def refuse_shared_gpus(world: int) -> None:
    """Raise BadInput if some of `world` ranks would share a GPU, which NCCL refuses. Without a GPU ranks share the CPU.

    A launcher may show each rank its own GPU alone; then one is enough.
    """
    gpus, here = gpu_count(), ranks.told_local_world_size(world)
    if not gpus or here is None or here <= gpus:
        return
    (name,) = build()
    if gpus == 1 and ranks.under_torchrun() and visible_by(name):
        return
    there = f"{gpus} GPU{'s' if gpus > 1 else ''}"
    raise BadInput(
        f"{here} ranks on a host with {there}: each needs its own; allowed: up to {gpus}, or {VISIBLE[name][-1]}='' for the CPU"
    )


def plan_shape(mesh: MeshRecipe, *, world: int, heads: int, latent_rows: int, fabric: Fabric = "switch") -> Shape:
    """Fit the recipe's mesh to `world` ranks, for experts with `heads` heads and latents with `latent_rows` on the longer side.

    With `mesh.cfg` and `mesh.ulysses` at auto, the `fabric` decides. Where each pair of GPUs has a separate link, an all-to-all
    among U ranks uses U - 1 of a GPU's links, and Ulysses over all ranks takes half the time of CFG 2 x half as many (50.4
    against 100.8 ms per step on 8x MI355X at the links' peak). Behind a switch all of a GPU's bandwidth serves any group, and
    CFG 2 sends less.

    Raises BadInput if the product is not the world size, if the heads are not divisible by the Ulysses degree, if a replica has
    more ranks than `latent_rows`, or if it would span hosts although the recipe does not allow it.
    """
    if isinstance(mesh.replicas, int):
        if world % mesh.replicas:
            raise BadInput(f"world size {world}: not divisible by mesh.replicas {mesh.replicas}; {_allowed(heads)}")
        replica = world // mesh.replicas
    else:
        assert isinstance(mesh.ulysses, int)
        replica = (1 if mesh.cfg == "auto" else mesh.cfg) * mesh.ulysses * mesh.ring
    if mesh.cfg != "auto":
        cfg = mesh.cfg
    elif isinstance(mesh.ulysses, int):
        cfg = 2 if replica // (mesh.ulysses * mesh.ring) >= 2 else 1
    else:
        halves = replica % (2 * mesh.ring) == 0
        whole = replica % mesh.ring == 0 and heads % max(1, replica // mesh.ring) == 0
        cfg = 2 if halves and not (fabric == "links" and whole) else 1
    ulysses = replica // (cfg * mesh.ring) if mesh.ulysses == "auto" else mesh.ulysses
    replicas = world // max(1, replica) if mesh.replicas == "auto" else mesh.replicas
    shape = Shape(replicas=replicas, cfg=cfg, ulysses=ulysses, ring=mesh.ring)
    if ulysses < 1 or shape.world != world:
        raise BadInput(f"world size {world}: the mesh {shape} needs {shape.world} ranks; {_allowed(heads)}")
    if heads % ulysses:
        raise BadInput(
            f"world size {world}: {heads} heads are not divisible by the Ulysses degree {ulysses} of the mesh {shape}; "
            f"{_allowed(heads)}"
        )
    if shape.per_replica > latent_rows:
        raise BadInput(
            f"world size {world}: {shape.per_replica} ranks per replica cannot share the VAE's {latent_rows} latent rows; "
            f"allowed: at most {latent_rows} ranks per replica for this size"
        )
    local = ranks.local_world_size(world)
    if local % shape.per_replica and not mesh.span_hosts:
        raise BadInput(
            f"world size {world}: {local} ranks on this host are not divisible by the {shape.per_replica} of a replica of the "
            f"mesh {shape}; allowed: whole replicas on each host, or mesh.span_hosts true"
        )
    return shape


def _allowed(heads: int) -> str:
    degrees = [str(one) for one in range(1, heads + 1) if heads % one == 0]
    return f"allowed: replicas x CFG (1 or 2) x Ulysses ({', '.join(degrees)}) x ring = world size"


class Mesh:
    """One rank's view of the running process groups. Made by `start`."""

    def __init__(
        self,
        shape: Shape,
        device: Device,
        rank: int,
        distributed: ModuleType,
        exchange: Exchange | None,
        unguided_groups: xdit_groups.SequenceGroups | None,
    ) -> None:
        self.shape = shape
        self.device = device
        self.exchange = exchange  # with the replica's other ranks; None if there are none
        self.unguided_groups = unguided_groups  # of both branches' ranks, where a step without guidance runs on all of them
        self.rank = rank
        self.replica = rank // shape.per_replica
        self.rank_in_replica = rank % shape.per_replica
        self._distributed = distributed

    @property
    def is_replica_first(self) -> bool:
        """True on the rank that holds its replica's frames."""
        return self.rank_in_replica == 0

    @property
    def vae_group(self) -> dist.ProcessGroup:
        """The process group of this replica's ranks, which share the decode."""
        return self._distributed.get_vae_parallel_group().device_group

    @property
    def branch(self) -> int:
        """Which branch of guidance this rank computes under CFG parallelism: 0 positive, 1 negative."""
        return self._distributed.get_classifier_free_guidance_rank() if self.shape.cfg == 2 else 0

    def own_branches(self, pair: tuple[T, T]) -> list[T]:
        """What this rank computes of (positive, negative): both, or with CFG parallelism its own branch."""
        return [pair[self.branch]] if self.shape.cfg == 2 else list(pair)

    def all_branches(self, own: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Exchange the branches' noise predictions: returns (positive, negative) on every rank."""
        if self.shape.cfg == 1:
            positive, negative = own
            return positive, negative
        assert self.exchange is not None
        half = self.shape.per_replica // 2
        partner = (self.rank_in_replica + half) % self.shape.per_replica
        mine = own[0].contiguous()
        other = self.exchange.start({partner: mine})()[partner]
        return (mine, other) if self.branch == 0 else (other, mine)

    def send_to_replica(self, message: str | None) -> str:
        """Broadcast a small message from the replica's first rank; returns it on every rank of the replica."""
        if self.shape.per_replica == 1:
            assert message is not None
            return message
        box = [message]
        group = self._distributed.get_model_replica_group()
        dist.broadcast_object_list(box, src=group.ranks[0], group=group.cpu_group)
        assert box[0] is not None
        return box[0]

    def first_says(self, yes: bool) -> bool:
        """Broadcast a yes or no from the replica's first rank, in one small message; returns it on every rank of the replica."""
        if self.shape.per_replica == 1:
            return yes
        group = self._distributed.get_model_replica_group()
        answer = torch.tensor([yes], dtype=torch.uint8)
        dist.broadcast(answer, src=group.ranks[0], group=group.cpu_group)
        return bool(answer.item())

    def gather_to_first(self, part: torch.Tensor) -> list[torch.Tensor] | None:
        """Gather tensors of one dtype and shape from the replica's ranks on its first rank. Returns None elsewhere."""
        if self.shape.per_replica == 1:
            return [part]
        group = self._distributed.get_model_replica_group()
        parts = [torch.empty_like(part) for _ in range(self.shape.per_replica)] if self.is_replica_first else None
        dist.gather(part, parts, dst=group.ranks[0], group=group.device_group)
        return parts

    def errors_on_first(self, error: str | None) -> list[str]:
        """Return the errors of the replica's ranks, on its first rank only. Every rank of the replica calls it."""
        if self.shape.per_replica == 1:
            return [error] if error else []
        group = self._distributed.get_model_replica_group()
        # Of fixed length, because a sample waits for it: one small exchange instead of the two that objects need.
        own = torch.frombuffer(bytearray((error or "").encode()[:ERROR_BYTES].ljust(ERROR_BYTES, b"\0")), dtype=torch.uint8)
        all_ranks = [torch.empty_like(own) for _ in range(self.shape.per_replica)] if self.is_replica_first else None
        dist.gather(own, all_ranks, dst=group.ranks[0], group=group.cpu_group)
        texts = [bytes(one.tolist()).rstrip(b"\0").decode(errors="replace") for one in all_ranks or []]
        return [text for text in texts if text]

    def message_group(self) -> dist.ProcessGroup:
        """Make a gloo group of all ranks, for messages between hosts. Every rank calls it."""
        return dist.new_group(backend="gloo")

    def barrier(self) -> None:
        """Wait for every rank of the world."""
        dist.barrier(group=self._distributed.get_world_group().cpu_group)

    def close(self) -> None:
        """End all groups."""
        if self.exchange is not None:
            self.exchange.close()
        xdit_groups.stop_groups()


def start(shape: Shape, device: Device, *, timeout_s: float = 600.0, unguided: bool = False) -> Mesh:
    """Start the groups of `shape` on this rank; every rank calls it. A collective that waits longer than `timeout_s` fails.

    `unguided`: there are steps without guidance.
    """
    rank, world = ranks.rank(), ranks.world_size()
    assert shape.world == world, f"{shape} on {world} ranks"
    if device.is_gpu:
        torch.cuda.set_device(device.torch)
    distributed = xdit_groups.start_groups(
        device,
        replicas=shape.replicas,
        cfg=shape.cfg,
        ulysses=shape.ulysses,
        ring=shape.ring,
        timeout_s=timeout_s,
    )
    exchange = None
    if shape.per_replica > 1:
        group = distributed.get_vae_parallel_group().device_group
        exchange = connect(group, is_gpu=device.is_gpu, timeout_s=timeout_s)
    unguided_groups = None
    if unguided and shape.cfg == 2:
        unguided_groups = xdit_groups.make_sequence_groups(
            device, ulysses=2 * shape.ulysses, ring=shape.ring, rank=rank, world=world, timeout_s=timeout_s
        )
    return Mesh(shape, device, rank, distributed, exchange, unguided_groups)


def send_to_all(message: T) -> T:
    """Broadcast a small message from rank 0 to every rank of the world; returns it on each."""
    box = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(own: T) -> list[T]:
    """Gather a small message from every rank of the world; returns all of them, by rank, on each."""
    said = [own] * dist.get_world_size()
    dist.all_gather_object(said, own)
    return said
