"""A connection of our own to the key-value store through which torchrun's ranks found each other.

torch.distributed's own connection is locked while a group waits in it for slower ranks, so neither the watch nor the work queue
may share it.
"""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch.distributed as dist


def connect(name: str, *, timeout_s: float = 300.0) -> Any:
    """Return the job's store with keys of its own under `name`; without torchrun, one for this process alone."""
    if "MASTER_ADDR" not in os.environ:
        return dist.PrefixStore(name, dist.HashStore())
    # torchrun's agent keeps the store; started by other means, rank 0 keeps it, as init_process_group would have it.
    kept_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_master=not kept_by_agent and os.environ["RANK"] == "0",
        timeout=datetime.timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"wan_mlperf/{attempt}/{name}", store)


def count(store: Any, key: str) -> int:
    """The value of a counter."""
    return int(store.add(key, 0))
