"""What ranks say to each other about samples: six messages, one encoder, one decoder. Pixels travel by transport.py."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Job:
    """Rank 0 to a replica, and a replica's first rank to its others: make the video of `prompt`.

    `ticket` is unique in a run; `sample` is the prompt's index, which people are told. `avoid` is the replica where it failed.
    `seed`, `negative_prompt` and `latent` (a file with the initial noise) are the workload's unless given; `workload` holds what
    else of the workload this video changes. A `watched` job reports its progress and can be cancelled; with `preview` its frames
    are to be seen while they are decoded.
    """

    ticket: int
    sample: int
    prompt: str
    attempt: int = 1
    avoid: int | None = None
    seed: int | None = None
    negative_prompt: str | None = None
    latent: str | None = None
    workload: dict[str, Any] | None = None
    watched: bool = False
    preview: bool = False


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A replica to rank 0, of a watched job: how many steps and video frames are done. The first one says that it has begun.

    `fragment` is the next part of its preview, in base64.
    """

    ticket: int
    steps: int = 0
    frames: int = 0
    fragment: str = ""


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
    """A replica to rank 0: this attempt failed, by rank 0's wish if `cancelled`. `reason` names rank, host, stage, error."""

    ticket: int
    replica: int
    reason: str
    cancelled: bool = False


@dataclass(frozen=True, kw_only=True)
class StayReady:
    """To a replica's ranks: nothing to do yet. Without it a wait of a day would end in the process group's own time-out."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """To a replica's ranks: there is nothing more to do."""


Message = Job | Progress | Done | Lost | StayReady | Stop
_TYPES = {kind.__name__: kind for kind in (Job, Progress, Done, Lost, StayReady, Stop)}


def encode(messages: list[Message]) -> str:
    """Return the messages as one line of text."""
    return json.dumps([[type(one).__name__, dataclasses.asdict(one)] for one in messages])


def decode(content: str | bytes) -> list[Message]:
    """Return the messages that `encode` was given."""
    return [_TYPES[name](**values) for name, values in json.loads(content)]
