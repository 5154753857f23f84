"""Which rank this process is, of how many, on which host: torchrun's environment, read here only.

A program may have started torch.distributed by other means before it loads a pipeline: then its process group is asked instead.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import Any

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of a rank, whoever starts it
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


def problem() -> str | None:
    """Say what is wrong with torchrun's variables: left over, not numbers, or contradictory. None if nothing is."""
    there = {name: os.environ[name] for name in (*NEEDED, *NUMBERS) if os.environ.get(name, "") != ""}
    meant = [name for name in there if not name.startswith("MASTER")]
    if not meant:  # an address alone is of no use to anyone, and often set
        return None
    allowed = f"allowed: unset {' '.join(meant)}, or start it with torchrun"
    named = f"{meant[0]}={there[meant[0]]} is set in the environment"
    missing = [name for name in NEEDED if name not in there]
    if missing:
        return f"{named} but {', '.join(missing)} not: it was left over from a job, or its launcher sets only some; {allowed}"
    for name in NUMBERS:
        if not (there.get(name, "0").isascii() and there.get(name, "0").isdigit()):
            return f"{name}={there[name]!r} in the environment is not a number; {allowed}"
    pairs = (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    for one, all_ranks in pairs:
        if one in there and all_ranks in there and int(there[one]) >= int(there[all_ranks]):
            return f"{one}={there[one]} with {all_ranks}={there[all_ranks]} in the environment; {allowed}"
    return None


def _group() -> Any:
    """torch.distributed if this program has started a process group; torch is not imported for the question."""
    module: Any = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_available() and module.is_initialized() else None


def environment_alone() -> dict[str, str]:
    """Return the environment for a child process that is not a rank, even if torchrun started this one."""
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def under_torchrun() -> bool:
    """True in a process that was started by torchrun, or by another launcher that sets its variables."""
    return all(os.environ.get(name) for name in NEEDED)


def rank() -> int:
    """This process's rank, 0 if it is the only one."""
    if group := _group():
        return int(group.get_rank())
    return int(os.environ["RANK"]) if under_torchrun() else 0


def world_size() -> int:
    """How many ranks there are in all, 1 if this process is the only one."""
    if group := _group():
        return int(group.get_world_size())
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1


def local_rank() -> int:
    """This process's number among the ranks of its host; without torchrun its rank, as if there were one host."""
    return int(os.environ.get("LOCAL_RANK") or "0") if under_torchrun() else rank()


def local_world_size(world: int) -> int:
    """Return how many of `world` ranks run on this host: without torchrun, all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or world) if under_torchrun() else world


def told_local_world_size(world: int) -> int | None:
    """Return how many of `world` ranks run on this host; None if a launcher other than torchrun does not say."""
    told = not under_torchrun() or bool(os.environ.get("LOCAL_WORLD_SIZE"))
    return local_world_size(world) if told else None


def own_cores() -> int:
    """Return how many of this host's cores each of its ranks gets, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size(world_size()))


def is_first() -> bool:
    """True on rank 0 and outside torchrun."""
    return rank() == 0


def node() -> str:
    """Return which host this rank is on: the number of torchrun's agent, or with another launcher the host's name."""
    return os.environ.get("GROUP_RANK") or socket.gethostname()


def master() -> tuple[str, int] | None:
    """Return address and port of the store through which the ranks found each other, or None without torchrun."""
    return (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])) if under_torchrun() else None


def agent_keeps_store() -> bool:
    """True if torchrun's agent keeps that store. With another launcher rank 0 keeps it, as in init_process_group."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def restarts() -> str:
    """Return how often torchrun has restarted these ranks."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def drop_torchrun_folders() -> None:
    """Remove the empty folders that torchrun makes for this rank in the temporary folder and never removes."""
    inside = Path(os.environ.get("TORCHELASTIC_ERROR_FILE") or "/none")
    if len(inside.parents) < 4 or not inside.parents[3].name.startswith("torchelastic_"):
        return
    with contextlib.suppress(OSError):
        for folder in [*inside.parents[1].iterdir(), *inside.parents[1:4]]:  # those of killed ranks, too
            with contextlib.suppress(OSError):
                folder.rmdir()
