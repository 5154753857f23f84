"""torchrun's environment, read here only: which rank this process is, of how many, on which host."""

from __future__ import annotations

import os
import socket


def under_torchrun() -> bool:
    """True in a process that torchrun started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process's rank, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many ranks there are in all, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number among the ranks of its host, 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size(world: int) -> int:
    """How many ranks of `world` run on this host: all of them without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world)) if under_torchrun() else world


def is_first() -> bool:
    """True on rank 0 and outside torchrun."""
    return rank() == 0


def node() -> str:
    """Which host this rank is on: torchrun's number of its agent, or the host's name if it was started by other means."""
    return os.environ.get("GROUP_RANK") or socket.gethostname()


def master() -> tuple[str, int] | None:
    """Address and port of the store through which the ranks found each other; None without torchrun."""
    address = os.environ.get("MASTER_ADDR")
    return None if address is None else (address, int(os.environ["MASTER_PORT"]))


def agent_keeps_store() -> bool:
    """True if torchrun's agent keeps that store; started by other means, rank 0 keeps it, as init_process_group has it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def restarts() -> str:
    """How often torchrun has started these ranks before."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
