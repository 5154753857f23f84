"""What an open page is told: the state of every unfinished job, as soon as it changes (server-sent events)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator

from wan_mlperf.serve.desk import Desk
from wan_mlperf.serve.task import Task

PAUSE_S = 0.02  # between two events: no more than 50 a second, however fast jobs come and go
SHARE = 0.1  # of a core that one open page may take
# Without a change the state is sent again after this long: while videos are made for their time left, else to keep proxies from
# closing the connection.
BUSY_S, IDLE_S = 1.0, 20.0


class Live:
    """The desk's unfinished jobs for pages. Takes the desk's `on_change`; `events` runs in the HTTP server's loop."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._pages: set[asyncio.Event] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        desk.on_change = self._tell

    def state(self) -> dict[str, object]:
        """Return the jobs that are watched, the number of others, and how many may wait."""
        tasks = self._desk.tasks()
        jobs, ahead = [], 0
        for task in tasks:
            waits = task.begun is None
            if task.job.watched:
                jobs.append(self._job(task, ahead if waits else None))
            ahead += waits
        return {"jobs": jobs, "others": len(tasks) - len(jobs), "most_waiting": self._desk.most_waiting}

    async def events(self) -> AsyncIterator[str]:
        """Yield the state now and after every change, until the server has stopped and no job is left."""
        self._loop, changed = asyncio.get_running_loop(), asyncio.Event()
        self._pages.add(changed)
        try:
            while True:
                changed.clear()  # before the state is read, so that no change is missed
                start = time.perf_counter()
                over, state = self._desk.is_over, self.state()
                event = f"data: {json.dumps(state)}\n\n"
                took = time.perf_counter() - start  # thousands of waiting jobs take tens of milliseconds
                yield event
                if over:
                    return
                await asyncio.sleep(max(PAUSE_S, took / SHARE))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(BUSY_S if state["jobs"] else IDLE_S):
                        await changed.wait()
        finally:
            self._pages.discard(changed)

    def _tell(self) -> None:
        """Wake every page's `events`. Safe to call from any thread."""
        if self._loop is not None and self._pages:
            with contextlib.suppress(RuntimeError):  # the server has just stopped, and with it the loop
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for changed in self._pages:
            changed.set()

    def _job(self, task: Task, place: int | None) -> dict[str, object]:
        """Return a job's state: its step and expert, or its `place` in the queue."""
        forecast, workload = self._desk.forecast, task.workload
        steps = task.steps  # once: it may change meanwhile
        if place is not None:
            left = forecast.seconds_to_wait(workload, before=place)
            stage = "waiting"
        else:
            assert task.begun is not None
            left = forecast.seconds_left(workload, share=task.share, running=time.perf_counter() - task.begun)
            stage = "decoding" if steps >= workload.steps else "denoising" if steps else "reading the prompt"
        return {
            "id": task.video_id,
            "prompt": task.job.prompt,
            "place": place,
            "stage": stage,
            "step": steps,
            "steps": workload.steps,
            "expert": task.plan[steps].expert if stage == "denoising" else None,
            "frames": task.frames,
            "progress": min(99, math.floor(100 * task.share)),
            "seconds_left": None if left is None else round(left, 1),
            "preview": bool(task.fragments),
        }
