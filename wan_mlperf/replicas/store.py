"""Separate connections to the key-value store through which torchrun's ranks found each other.

torch.distributed's own connection is locked while a group waits for slower ranks, so the watch and the work queue must not share
it.
"""

from __future__ import annotations

import datetime

import torch.distributed as dist

from wan_mlperf import ranks


def connect(name: str, *, timeout_s: float = 300.0) -> dist.Store:
    """Return a connection to the job's store, with separate keys under `name`. Without torchrun, a store of this process."""
    master = ranks.master()
    if master is None:
        return dist.PrefixStore(name, dist.HashStore())
    store = dist.TCPStore(
        *master,
        ranks.world_size(),
        is_master=not ranks.agent_keeps_store() and ranks.is_first(),
        timeout=datetime.timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return dist.PrefixStore(f"wan_mlperf/{ranks.restarts()}/{name}", store)


def count(store: dist.Store, key: str) -> int:
    """Return the value of a counter."""
    return int(store.add(key, 0))
