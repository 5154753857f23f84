"""Process groups: our time-out in each, and the network interface that the user names."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.distributed as dist

from wan_mlperf.errors import BadInput
from wan_mlperf.kernels.device import probe
from wan_mlperf.parallel import mesh, xdit_groups

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
