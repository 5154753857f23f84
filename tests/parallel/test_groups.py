"""Process groups: our time-out in each, the network interface that the user names, and a GPU for each rank."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist

from wan_mlperf.errors import BadInput
from wan_mlperf.kernels.device import Device, probe
from wan_mlperf.parallel import fake_ranks, mesh, xdit, xdit_groups

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
ALONE = mesh.Shape(replicas=1, cfg=1, ulysses=1, ring=1)


@pytest.fixture(autouse=True)
def _none_before() -> None:
    xdit_groups.stop_groups()


def test_every_group_has_our_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """xDiT's sub-groups, too, which would otherwise give up after torch's ten or thirty minutes: a server may idle longer."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    c10d: Any = importlib.import_module("torch.distributed.distributed_c10d")
    made = mesh.start(ALONE, probe(), timeout_s=4321.0)
    try:
        timeouts = [group._get_backend(torch.device("cpu")).options._timeout for group in c10d._world.pg_map]
        assert len(timeouts) > 5
        assert {one.total_seconds() for one in timeouts} == {4321.0}
        dist.all_reduce(torch.ones(1), group=made.vae_group)
    finally:
        made.close()


def test_an_interface_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,ib7")
    with pytest.raises(BadInput, match=r"GLOO_SOCKET_IFNAME: 'ib7' is not a network interface of this host; allowed: .*lo"):
        mesh.start(ALONE, probe())
    assert not dist.is_initialized()


def test_a_loopback_name_is_refused_on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian writes 127.0.1.1 for the own name: gloo would tell it to the other hosts."""
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    monkeypatch.setattr("wan_mlperf.ranks.world_size", lambda: 16)
    monkeypatch.setattr("wan_mlperf.ranks.local_world_size", lambda _world: 8)
    monkeypatch.setattr("wan_mlperf.ranks.master", lambda: ("192.0.2.1", 29500))
    with pytest.raises(BadInput, match=r"host name 'localhost' resolves to this host's loopback.*GLOO_SOCKET_IFNAME"):
        xdit_groups._gloo_devices(None)
    monkeypatch.setattr("wan_mlperf.ranks.master", lambda: ("127.0.0.1", 29500))  # several agents of one host
    assert len(xdit_groups._gloo_devices(dist.ProcessGroupGloo)) == 1


def test_a_rank_uses_the_gpu_that_it_sees_and_a_rehearsal_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """xDiT makes a GPU current by the local rank: seen on a host with one GPU, where rank 7 of a rehearsal asked for GPU 7."""
    xdit.load()
    current: list[int] = []
    monkeypatch.setattr(importlib.import_module("xfuser.envs"), "get_device_name", lambda: "cuda")
    monkeypatch.setattr(importlib.import_module("xfuser.core.distributed.parallel_state"), "set_device", current.append)
    shape = mesh.Shape(replicas=1, cfg=1, ulysses=8, ring=1)
    with fake_ranks.fake_mesh(shape, probe(), 7):
        assert current == []
    gpu = Device(arch="sm90", name="H100", torch=torch.device("cuda", 0))
    with fake_ranks.fake_mesh(shape, gpu, 7):
        assert current == [0]


@pytest.mark.parametrize(
    ("gpus", "world", "environment", "refused"),
    [
        (1, 2, {}, True),
        (2, 2, {}, False),
        (0, 2, {}, False),  # on the CPU
        (1, 2, {"CUDA_VISIBLE_DEVICES": "3"}, True),  # one of several GPUs, for all the ranks that we start
        (1, 2, {**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, True),
        (1, 2, {**TORCHRUN, "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "3"}, False),  # the launcher gives each its own
        (1, 2, {**TORCHRUN, "LOCAL_WORLD_SIZE": "1"}, False),  # on two hosts
        (2, 4, {**TORCHRUN, "LOCAL_WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "0,1"}, True),
    ],
)
def test_ranks_that_would_share_a_gpu(
    gpus: int, world: int, environment: dict[str, str], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mesh, "gpu_count", lambda: gpus)
    monkeypatch.setattr(mesh, "build", lambda: {"CUDA": "13.0"})
    if not refused:
        mesh.refuse_shared_gpus(world)
        return
    there = f"{world} ranks on a host with {gpus} GPU{'s' if gpus > 1 else ''}"
    says = f"{there}: each needs its own; allowed: up to {gpus}, or CUDA_VISIBLE_DEVICES='' for the CPU"
    with pytest.raises(BadInput, match=re.escape(says)):
        mesh.refuse_shared_gpus(world)
