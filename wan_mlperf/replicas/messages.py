"""What ranks say to each other about samples: four messages, one encoder, one decoder. Pixels travel by transport.py."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Job:
    """Rank 0 to a replica, and a replica's first rank to its others: make the video of `prompt`.

    `ticket` is unique in a run; `sample` is the prompt's index, which people are told. `avoid` is the replica where it failed.
    """

    ticket: int
    sample: int
    prompt: str
    attempt: int = 1
    avoid: int | None = None


@dataclass(frozen=True, kw_only=True)
class Done:
    """A replica to rank 0: the content of a sample is ready, `size` bytes.

    With `descriptor` it lies in memory of process `process` on rank 0's host; without, it comes from `rank` over the group.
    `seconds` and `spans` are the sample's own time, in all and per stage.
    """

    ticket: int
    rank: int
    size: int
    seconds: float
    spans: dict[str, float] = field(default_factory=dict)
    process: int | None = None
    descriptor: int | None = None


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A replica to rank 0: this attempt failed. `reason` names rank, host, stage and error."""

    ticket: int
    replica: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Stop:
    """To a replica's ranks: there is nothing more to do."""


Message = Job | Done | Lost | Stop
_TYPES = {kind.__name__: kind for kind in (Job, Done, Lost, Stop)}


def encode(messages: list[Message]) -> bytes:
    """Return the messages as bytes."""
    return json.dumps([[type(one).__name__, dataclasses.asdict(one)] for one in messages]).encode()


def decode(content: bytes) -> list[Message]:
    """Return the messages that `encode` was given."""
    return [_TYPES[name](**values) for name, values in json.loads(content)]
