"""What an open page is told: in this process with a stand-in for the engine, and by a server of real ranks."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.replicas import jobs
from tests.serve.client import Server
from tests.serve.test_desk import Place, submitted
from wan_mlperf import load_recipe
from wan_mlperf.preflight import prepare
from wan_mlperf.replicas.messages import Progress
from wan_mlperf.serve.live import Live


def under_way(steps: int, frames: int) -> Callable[[Any], bool]:
    """True for a state whose first job has begun and has done so much."""

    def met(state: Any) -> bool:
        job = state["jobs"][0]
        return job["place"] is None and (job["step"], job["frames"]) == (steps, frames)

    return met


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(prepare(load_recipe("tiny"), world=2), tmp_path)
    yield made
    made.close()


async def told(events: AsyncIterator[str]) -> Any:
    """The next event's state."""
    event = await asyncio.wait_for(anext(events), 10)
    assert event.startswith("data: ") and event.endswith("\n\n") and event.count("\n") == 2
    return json.loads(event[len("data: ") :])


async def told_until(events: AsyncIterator[str], met: Callable[[Any], bool]) -> Any:
    """The first event whose state is this: an event may come for a change that the one before has told already."""
    while not met(state := await told(events)):
        pass
    return state


def test_every_step_is_told_as_soon_as_it_is_done(place: Place) -> None:
    """To two pages, in the order of the steps; when a job is gone, its video is there."""

    async def follow() -> None:
        live = Live(place.desk)
        pages = live.events(), live.events()
        for events in pages:
            assert (await told(events))["jobs"] == []
        task = await asyncio.to_thread(place.accept, "a <circle>\nand a line", preview=True)
        await asyncio.to_thread(submitted, place, 1)
        for events in pages:
            (job,) = (await told_until(events, lambda state: state["jobs"]))["jobs"]
            assert (job["prompt"], job["place"], job["progress"]) == ("a <circle>\nand a line", 0, 0)
        for steps, frames in [(number, 0) for number in range(21)] + [(20, 1), (20, 17)]:
            place.engine.on_progress(Progress(ticket=task.job.ticket, steps=steps, frames=frames))
            share = min(99, math.floor(100 * (steps + 2 * frames / 17) / 22))  # the decode counts as two steps of twenty
            for events in pages:
                (job,) = (await told_until(events, under_way(steps, frames)))["jobs"]
                assert job["progress"] == share and job["preview"] is False
        place.engine.on_progress(Progress(ticket=task.job.ticket, fragment="AAAA"))
        for events in pages:
            await told_until(events, lambda state: state["jobs"][0]["preview"])
        await asyncio.to_thread(place.engine.make)
        for events in pages:
            await told_until(events, lambda state: not state["jobs"])
        video = place.book.get(task.video_id)
        assert video is not None and video.status == "completed"

    asyncio.run(follow())


def test_a_page_without_news_is_left_alone_and_let_go_at_the_end(place: Place) -> None:
    async def follow() -> None:
        events = Live(place.desk).events()
        assert await told(events) == {"jobs": [], "others": 0, "most_waiting": 3}
        await asyncio.to_thread(place.accept, "prompt")
        await asyncio.to_thread(submitted, place, 1)
        await told_until(events, lambda state: state["jobs"])
        await asyncio.to_thread(place.engine.make)
        await told_until(events, lambda state: not state["jobs"])
        news, more = asyncio.ensure_future(anext(events)), 0
        while (await asyncio.wait([news], timeout=2))[0]:
            news, more = asyncio.ensure_future(anext(events)), more + 1
            assert more == 1  # the change may be told once more
        place.desk.stop()
        assert json.loads((await asyncio.wait_for(news, 10))[len("data: ") :])["jobs"] == []
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(anext(events), 10)

    asyncio.run(follow())


def listen(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
    """Ask for the events."""
    connection.request("GET", "/live/events")
    answer = connection.getresponse()
    assert answer.status == 200 and str(answer.headers["content-type"]).startswith("text/event-stream")
    return answer


def next_jobs(answer: http.client.HTTPResponse) -> Any:
    """The jobs of the next event."""
    event = answer.readline()
    assert answer.readline() == b"\n"
    return json.loads(event.removeprefix(b"data: "))["jobs"]


def test_a_server_tells_real_steps_only(served: Server) -> None:
    """Of two steps and five frames, of which the decode counts as one step more."""
    with closing(http.client.HTTPConnection(served.host, served.port, timeout=60)) as connection:
        events = listen(connection)
        assert next_jobs(events) == []
        video = served.ask("POST", "/v1/videos", {"prompt": "a red circle", "preview": True}).json
        seen = []
        while job := next((one for one in next_jobs(events) if one["id"] == video["id"]), None):
            seen.append(job)
        assert served.ask("GET", f"/v1/videos/{video['id']}").json["status"] == "completed"
    assert seen
    for job in seen:
        assert job["progress"] == min(99, math.floor(100 * (job["step"] + job["frames"] / 5) / 3)), job
    done = [(job["place"] is None, job["step"], job["frames"], job["preview"]) for job in seen]
    assert done == sorted(done), done


@pytest.mark.slow
def test_an_open_page_does_not_hold_up_the_end(tmp_path: Path, model: Path) -> None:
    """Its stream of events ends in an orderly way: for one that is cut off, `read` raises IncompleteRead."""
    server = Server(jobs.write_recipe(tmp_path, model), tmp_path / "videos").ready()
    with closing(http.client.HTTPConnection(server.host, server.port, timeout=60)) as connection:
        with server.running():
            events = listen(connection)
            assert next_jobs(events) == []
        assert b"data: " in events.read()
