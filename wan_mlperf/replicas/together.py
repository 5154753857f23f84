"""Checks that all ranks of a job run together before any work: what one rank refuses, all refuse, with one message.

Otherwise a file that is missing on one host would end that rank silently and leave the others waiting.
"""

from __future__ import annotations

import base64
import datetime
import functools
import itertools
import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from wan_mlperf import process, ranks
from wan_mlperf.errors import BadInput, Failed
from wan_mlperf.inputs import text
from wan_mlperf.replicas.store import connect

if TYPE_CHECKING:
    from torch.distributed import Store

CONNECT_S, WAIT_S = 60.0, 300.0  # how long a rank tries to reach the store, and waits for the others to get as far
_times = itertools.count()


@contextmanager
def checks() -> Iterator[None]:
    """Put this around checks: either every rank leaves the block normally, or every rank raises the same BadInput."""
    if ranks.world_size() == 1:
        yield
        return
    problem = ""
    try:
        yield
    except BadInput as error:
        problem = process.one_line(error)
    except Exception as error:
        line = process.why(error)
        if line is None:  # a bug of ours: this rank's traceback tells more
            raise
        problem = line
    found = _from_all(problem)
    first = next((rank for rank, line in enumerate(found) if line), None)
    if first is not None:
        host = json.loads(_store().get(f"host/{first}"))
        raise BadInput(found[first] if found[0] else f"rank {first} on {host}: {found[first]}")


def streams(paths: Sequence[str | None]) -> None:
    """Have rank 0 read those of `paths` that are streams, and give every rank their content. Every rank calls it."""
    named = [path for path in paths if path is not None]
    if ranks.world_size() == 1 or not named:
        return
    mine: dict[str, str] = {}
    if ranks.is_first():
        for path in named:
            if text.may_be_stream(path):
                try:
                    mine[path] = base64.b64encode(text.read_bytes(path)).decode()
                except (OSError, ValueError):  # reported by whoever reads it
                    continue
    for path, content in _from_first(mine).items():
        text.remember(path, base64.b64decode(content))


def _from_first(value: object) -> Any:
    store, key = _store(), f"first/{next(_times)}"
    if ranks.is_first():
        store.set(key, json.dumps(value))
    return json.loads(_wait(store, [key])[0])


def _from_all(value: str) -> list[str]:
    store, number = _store(), next(_times)
    store.set(f"host/{ranks.rank()}", json.dumps(socket.gethostname()))
    store.set(f"all/{number}/{ranks.rank()}", json.dumps(value))
    return [json.loads(one) for one in _wait(store, [f"all/{number}/{rank}" for rank in range(ranks.world_size())])]


@functools.cache
def _store() -> Store:
    try:
        return connect("together", timeout_s=CONNECT_S)
    except Exception as error:
        raise Failed(f"{_where()} cannot be reached ({process.one_line(error)[:160]})") from None


def _wait(store: Store, keys: Sequence[str]) -> list[bytes]:
    try:
        store.wait(list(keys), datetime.timedelta(seconds=WAIT_S))
        return [store.get(key) for key in keys]
    except Exception as error:
        raise Failed(f"{_where()}: not every rank came within {WAIT_S:.0f} s ({process.one_line(error)[:160]})") from None


def _where() -> str:
    address = ":".join(map(str, ranks.master() or ()))
    return f"the job's store at {address}, which RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment name,"
