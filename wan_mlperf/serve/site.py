"""What every route needs, and how a client waits for a video."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from wan_mlperf.preflight import Setup
from wan_mlperf.serve import body
from wan_mlperf.serve.book import Book
from wan_mlperf.serve.desk import Desk
from wan_mlperf.serve.guard import Access
from wan_mlperf.serve.metrics import Metrics
from wan_mlperf.serve.task import Outcome, Task
from wan_mlperf.serve.wanted import EndpointsFields, Reader, Wanted


@dataclass(frozen=True, kw_only=True)
class Site:
    """The parts of a running server."""

    setup: Setup
    desk: Desk
    book: Book
    reader: Reader
    metrics: Metrics
    access: Access
    made_by: Mapping[str, object]

    @property
    def model(self) -> str:
        """The model's name for clients: the recipe's, never a path."""
        return self.setup.recipe.name


async def endpoints_request(site: Site, request: Request) -> tuple[Wanted, EndpointsFields]:
    """Read a request of MLCommons' client. Raises Refused."""
    values, text = await body.read(request)
    wanted, fields = await run_in_threadpool(site.reader.read, values, "endpoints", text=text)
    return wanted, fields


async def finished(site: Site, request: Request, task: Task) -> Outcome | None:
    """Wait for a video. If the client disconnects first, delete the job and return None. Raises Refused."""
    outcome: asyncio.Future[Outcome] = asyncio.wrap_future(task.outcome)
    gone = asyncio.create_task(_disconnected(request))
    both: set[asyncio.Future[Outcome] | asyncio.Task[None]] = {outcome, gone}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if outcome.done():
            return outcome.result()
        site.desk.delete(task.video_id)
        return None
    finally:
        gone.cancel()
        outcome.add_done_callback(_seen)


def timing(outcome: Outcome) -> dict[str, str]:
    """Return the header Server-Timing, which tells the client where its video's time went, in milliseconds."""
    return {"Server-Timing": ", ".join(f"{stage};dur={1e3 * value:.2f}" for stage, value in outcome.spans.items())}


def _seen(outcome: asyncio.Future[Outcome]) -> None:
    """Retrieve the exception of an outcome that nobody waits for: asyncio logs exceptions that nobody retrieves."""
    if not outcome.cancelled():
        outcome.exception()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
