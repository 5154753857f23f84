"""Makes xDiT's process groups, on the program's own default group or one started here, and swaps sets of them.

Like xdit.py, this touches xDiT's internals, and says why.
"""

from __future__ import annotations

import datetime
import importlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch.distributed as dist

from wan_mlperf import ranks
from wan_mlperf.errors import BadInput
from wan_mlperf.kernels.device import Device
from wan_mlperf.parallel import xdit

_GROUPS = ("_WORLD", "_MODEL_REPLICA", "_DP", "_CFG", "_SP", "_TP", "_PP", "_FS", "_VAE")  # xDiT's, in parallel_state


@dataclass
class _Ground:
    """The default process group that xDiT's groups stand on, and whether it was started here."""

    group: dist.ProcessGroup | None = None
    ours: bool = False
    store: tuple[dist.Store, int, int] | None = None  # where the ranks found each other
    starts: int = 0


_ground = _Ground()


def start_groups(device: Device, *, replicas: int, cfg: int, ulysses: int, ring: int, timeout_s: float) -> ModuleType:
    """Start torch.distributed, unless the program has, and xDiT's groups; return xfuser.core.distributed.

    A second call replaces xDiT's groups. The program's own process group, if there is one, is used and left as it is.
    """
    xdit.load()
    state: Any = importlib.import_module("xfuser.core.distributed.parallel_state")
    distributed = importlib.import_module("xfuser.core.distributed")
    with _our_groups(timeout_s):
        _start_world(device, distributed, state, timeout_s)
        if distributed.model_parallel_is_initialized():
            state.destroy_model_parallel()
            state._FS = None  # left behind by destroy_model_parallel, and then refused by initialize_model_parallel
        distributed.initialize_model_parallel(
            data_parallel_degree=replicas,
            classifier_free_guidance_degree=cfg,
            sequence_parallel_degree=ulysses * ring,
            ulysses_degree=ulysses,
            ring_degree=ring,
            use_parallel_vae=True,
            backend="nccl" if device.is_gpu else "gloo",
        )
    _start_runtime_state(replicas=replicas, cfg=cfg, ulysses=ulysses, ring=ring)
    return distributed


def _start_world(device: Device, distributed: ModuleType, state: ModuleType, timeout_s: float) -> None:
    """Start the group of all ranks: torch.distributed's, unless the program has, and xDiT's on top of it."""
    if not dist.is_initialized() or dist.group.WORLD is not _ground.group:  # xDiT's groups, if any, were another one's
        for name in _GROUPS:
            setattr(state, name, None)
        _ground.ours = not dist.is_initialized()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.is_gpu else "gloo"
        timeout = datetime.timedelta(seconds=timeout_s)
        if ranks.under_torchrun():
            store, rank, world = _store(timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        else:  # one process without torchrun: no address is needed
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    if state._WORLD is None:
        with _own_gpu_only(state, device):
            distributed.init_distributed_environment(
                world_size=dist.get_world_size(), rank=dist.get_rank(), local_rank=_gpu_of(device)
            )
    _ground.group = dist.group.WORLD


def _gpu_of(device: Device) -> int:
    """What xDiT calls a local rank, by which it chooses a GPU: a rank may see its own GPU alone, as number 0."""
    return device.torch.index or 0


@contextmanager
def _own_gpu_only(state: Any, device: Device) -> Iterator[None]:
    # xDiT makes a GPU current as soon as the host has one, also for a rank that computes on the CPU: that of a rehearsal.
    before = state.set_device
    if not device.is_gpu:
        state.set_device = lambda _index: None
    try:
        yield
    finally:
        state.set_device = before


def _store(timeout: datetime.timedelta) -> tuple[dist.Store, int, int]:
    """Where ranks under torchrun put the addresses of a new default group: (store, rank, world), with another prefix each time.

    torch uses the same keys again for the next default group of a process. A rank that looks before its peer has written the new
    address then waits for one that is gone, until the timeout. All ranks come here equally often, so their counts agree.
    """
    if _ground.store is None:
        _ground.store = next(dist.rendezvous("env://", timeout=timeout))
    store, rank, world = _ground.store
    store.set_timeout(timeout)
    _ground.starts += 1
    return dist.PrefixStore(f"wan_mlperf/{_ground.starts}", store), rank, world


@contextmanager
def _our_groups(timeout_s: float) -> Iterator[None]:
    """While groups are made, have those of gloo share a device, and give all our timeout. xDiT has no option for either."""
    # By default every gloo group opens its own device, whose thread wakes up a hundred times a second. xDiT makes about twenty
    # groups, so two ranks woke two busy cores 4,800 times a second. Groups can share a device, but torch has no option for it.
    c10d: Any = importlib.import_module("torch.distributed.distributed_c10d")
    gloo: Any = c10d.ProcessGroupGloo
    devices, timeout = _gloo_devices(gloo), datetime.timedelta(seconds=timeout_s)
    before = set(c10d._world.pg_map)

    class OnOurDevices(gloo):  # a class, because torch asks whether groups are instances of this name
        def __init__(self, store: dist.Store, rank: int, size: int, *, timeout: datetime.timedelta) -> None:
            options = gloo._Options()
            options._devices, options._timeout = devices, timeout
            super().__init__(store, rank, size, options)

    c10d.ProcessGroupGloo = OnOurDevices
    try:
        yield
    finally:
        c10d.ProcessGroupGloo = gloo
    for group in set(c10d._world.pg_map) - before:
        if dist.get_backend(group) != "fake":
            c10d._set_pg_timeout(timeout, group)


def _gloo_devices(gloo: Any) -> list[Any]:
    """Gloo devices for the interfaces in GLOO_SOCKET_IFNAME, which torch reads the same way; else for this host's name."""
    if dist.is_initialized() and dist.get_backend() == "fake":  # a rehearsal of other ranks
        return [gloo.create_default_device()]
    wanted = [name.strip() for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name.strip()]
    there = sorted(name for _, name in socket.if_nameindex())
    for name in wanted:
        if name not in there:
            raise BadInput(f"GLOO_SOCKET_IFNAME: {name!r} is not a network interface of this host; allowed: {', '.join(there)}")
    several = ranks.world_size() > ranks.local_world_size(ranks.world_size())
    master = ranks.master()
    # If rank 0's address is a loopback one, too, several of torchrun's agents share this host. On a cluster, rank 0's own host
    # may see it as one as well, so that only the other hosts notice.
    elsewhere = several and master is not None and not _is_loopback(master[0])
    if not wanted and elsewhere and _is_loopback(socket.gethostname()):
        raise BadInput(
            f"host name {socket.gethostname()!r} resolves to this host's loopback address, where ranks of other hosts would "
            f"wait forever; allowed: GLOO_SOCKET_IFNAME=<interface>, one of {', '.join(there)}"
        )
    return [gloo.create_device(interface=name) for name in wanted] or [gloo.create_default_device()]


def _is_loopback(host: str) -> bool:
    try:
        return all(info[4][0] == "::1" or str(info[4][0]).startswith("127.") for info in socket.getaddrinfo(host, None))
    except OSError:
        return False  # a name that does not resolve: gloo looks for an address by itself


class SequenceGroups(NamedTuple):
    """xDiT's sequence-parallel group, and the process groups in which USP exchanges heads and rotates the ring."""

    coordinator: Any
    ulysses: dist.ProcessGroup
    ring: dist.ProcessGroup


def sequence_groups() -> SequenceGroups:
    """Return the groups that USP uses now."""
    state: Any = importlib.import_module("xfuser.core.distributed.parallel_state")
    process_groups = importlib.import_module("yunchang.globals").PROCESS_GROUP
    return SequenceGroups(state.get_sp_group(), process_groups.ULYSSES_PG, process_groups.RING_PG)


def make_sequence_groups(device: Device, *, ulysses: int, ring: int, rank: int, world: int, timeout_s: float) -> SequenceGroups:
    """Make another set of groups, of consecutive ranks; those in use stay. Every rank of the world calls it."""
    state: Any = importlib.import_module("xfuser.core.distributed.parallel_state")
    globals_: Any = importlib.import_module("yunchang.globals")
    before = globals_.PROCESS_GROUP.ULYSSES_PG, globals_.PROCESS_GROUP.RING_PG
    size = ulysses * ring
    with _our_groups(timeout_s):
        globals_.set_seq_parallel_pg(sp_ulysses_degree=ulysses, sp_ring_degree=ring, rank=rank, world_size=world)
        made = globals_.PROCESS_GROUP.ULYSSES_PG, globals_.PROCESS_GROUP.RING_PG
        globals_.PROCESS_GROUP.ULYSSES_PG, globals_.PROCESS_GROUP.RING_PG = before
        coordinator = state.init_model_parallel_group(
            group_ranks=[list(range(first, first + size)) for first in range(0, world, size)],
            local_rank=_gpu_of(device),
            backend="nccl" if device.is_gpu else "gloo",
            parallel_mode="sequence",
            ulysses_group=made[0],
            ring_group=made[1],
        )
    return SequenceGroups(coordinator, *made)


@contextmanager
def sequence_over(groups: SequenceGroups) -> Iterator[None]:
    """Make USP use these groups. It takes no argument for them: it reads globals of xDiT and yunchang."""
    state: Any = importlib.import_module("xfuser.core.distributed.parallel_state")
    process_groups: Any = importlib.import_module("yunchang.globals").PROCESS_GROUP
    before = state._SP, process_groups.ULYSSES_PG, process_groups.RING_PG
    state._SP, process_groups.ULYSSES_PG, process_groups.RING_PG = groups
    try:
        yield
    finally:
        state._SP, process_groups.ULYSSES_PG, process_groups.RING_PG = before


def _start_runtime_state(*, replicas: int, cfg: int, ulysses: int, ring: int) -> None:
    # USP reads switches from xDiT's runtime state. Without one of xDiT's own pipelines, initialize_runtime_state makes a state
    # for a single rank, and its automatic choice of a backend looks for CUDA libraries. So the state is made here, with a backend
    # that is accepted on every device and mesh; each of our calls names its own.
    runtime: Any = importlib.import_module("xfuser.core.distributed.runtime_state")
    arguments = importlib.import_module("xfuser.config.args").xFuserArgs(
        data_parallel_degree=replicas,
        use_cfg_parallel=cfg == 2,
        ulysses_degree=ulysses,
        ring_degree=ring,
        attention_backend="SDPA_FLASH",
    )
    config, _ = arguments.create_config()
    runtime._RUNTIME = runtime.RuntimeState(config)


def stop_groups() -> None:
    """End xDiT's groups, and torch.distributed if it was started here."""
    if not dist.is_initialized() or dist.group.WORLD is not _ground.group:
        return
    state: Any = importlib.import_module("xfuser.core.distributed.parallel_state")
    state.destroy_model_parallel()
    state._FS = None
    state._WORLD.destroy()
    state._WORLD = None
    if _ground.ours:
        dist.destroy_process_group()
    _ground.group = None
