"""What ranks tell each other about samples: six messages, one encoder, one decoder. Pixels go through transport.py."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Job:
    """Rank 0 to a replica, and a replica's first rank to its others: make the video of `prompt`.

    `ticket` is unique in a run; `sample` is the prompt's index, which messages to users name. `avoid` is the replica where it
    failed. `seed`, `negative_prompt` and `latent` (a file with the initial noise) default to the workload's; `workload` holds
    other changes of the workload for this video. A `watched` job reports its progress and can be cancelled; with `preview` its
    frames can be seen while they are decoded.
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
    """A replica to rank 0, about a watched job: how many steps and video frames are done. The first one says that it has begun.

    `fragment` is the next part of the preview, in base64.
    """

    ticket: int
    steps: int = 0
    frames: int = 0
    fragment: str = ""


@dataclass(frozen=True, kw_only=True)
class Done:
    """A replica to rank 0: the content of a sample is ready, `size` bytes.

    With a `descriptor` it is in memory of process `process` on rank 0's host. Without one, `rank` sends it over the group.
    `seconds` and `spans` are the sample's time, in total and per stage.
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
    """A replica to rank 0: this attempt failed, or was `cancelled` by rank 0. `reason` names rank, host, stage and error."""

    ticket: int
    replica: int
    reason: str
    cancelled: bool = False


@dataclass(frozen=True, kw_only=True)
class StayReady:
    """To a replica's ranks: nothing to do yet. Without it, the process group would time out after a day of waiting."""


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
