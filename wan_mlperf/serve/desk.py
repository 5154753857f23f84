"""The queue in front of the dispatcher: accepts jobs, hands each over when a replica can start it, and reports the outcome.

The benchmark, applications and the page share it, first come, first served. `work` runs inside the dispatcher's `run`; everything
else is safe to call from any thread.
"""

from __future__ import annotations

import base64
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from wan_mlperf import process
from wan_mlperf.preflight import Setup
from wan_mlperf.replicas.dispatch import FinishedSample, ServingDispatcher
from wan_mlperf.replicas.messages import Job, Progress
from wan_mlperf.serve.book import Book, Video
from wan_mlperf.serve.errors import Refused, stopping
from wan_mlperf.serve.forecast import Forecast
from wan_mlperf.serve.metrics import Metrics
from wan_mlperf.serve.task import Outcome, Task
from wan_mlperf.serve.wanted import Wanted
from wan_mlperf.videos.manifest import identity, key_of
from wan_mlperf.workload import Workload

STAY_READY_S = 3600.0
FAILED = "the video could not be made; the server's log says why"
GONE = "the video was deleted"


class Desk:
    """All unfinished tasks. `most_waiting` limits the queue of jobs whose clients do not wait on a connection.

    `on_change` is called, from any thread, whenever a task has come, made progress or ended, and when the server stops.
    """

    def __init__(self, dispatcher: ServingDispatcher, setup: Setup, book: Book, metrics: Metrics, *, most_waiting: int) -> None:
        self.most_waiting = most_waiting
        self.on_change: Callable[[], object] = lambda: None
        self._dispatcher, self._setup, self._book, self._metrics = dispatcher, setup, book, metrics
        self._waiting: deque[Task] = deque()
        self._in_flight: dict[int, Task] = {}
        self._tasks: dict[str, Task] = {}
        self._tickets = 0
        self._stopping = False
        self._lock = threading.Condition()
        self._recipes: dict[Workload, tuple[str, dict[str, object]]] = {}
        self.forecast = Forecast(setup.shape.replicas * setup.recipe.offline.batch)
        dispatcher.on_result, dispatcher.on_lost, dispatcher.on_progress = self._made, self._lost, self._moved
        metrics.watch(waiting=lambda: len(self._waiting), in_flight=lambda: len(self._in_flight))

    def accept(self, wanted: Wanted, *, route: str, held: bool) -> Task:
        """Accept a job. A full queue does not refuse one that is `held`, whose client waits on its connection. Raises Refused."""
        workload, recipe = wanted.workload, self._recipe(wanted)
        with self._lock:
            if self._stopping:
                raise stopping()
            if not held and self._unheld_waiting() >= self.most_waiting:
                message = f"{self.most_waiting} videos are waiting already; try again later"
                raise Refused(message, status=429, code="queue_full", retry_after=str(self.forecast.seconds_to_next()))
            video = self._book.add(
                recipe=recipe,
                route=route,
                prompt=wanted.prompt,
                seed=self._setup.workload.seed if wanted.seed is None else wanted.seed,
                negative_prompt=wanted.negative_prompt,
                size=f"{workload.width}x{workload.height}",
                seconds=f"{workload.frames / workload.fps:.0f}",
            )
            job = Job(
                ticket=self._tickets,
                sample=video.number,
                prompt=wanted.prompt,
                seed=wanted.seed,
                negative_prompt=wanted.negative_prompt,
                latent=wanted.latent,
                workload=wanted.changes,
                watched=route != "generations",
                preview=wanted.preview,
            )
            self._tickets += 1
            task = Task(video_id=video.id, job=job, workload=workload, plan=wanted.plan, held=held, accepted=time.perf_counter())
            self._tasks[video.id] = task
            if held:
                self._enqueue(task)
        self.on_change()
        if not held:
            self._book.flush()  # on disk before it starts and before its client knows of it
            with self._lock:
                if self._stopping:
                    self._give_up(task, stopping())
                    raise stopping()
                self._enqueue(task)
        return task

    @property
    def is_stopping(self) -> bool:
        """True once no more jobs are accepted."""
        return self._stopping

    @property
    def is_over(self) -> bool:
        """True once no more jobs are accepted and none is left."""
        return self._stopping and not self._tasks

    def task(self, video_id: str) -> Task | None:
        """Return the task of an unfinished job; None if there is none."""
        return self._tasks.get(video_id)

    def tasks(self) -> list[Task]:
        """Return all unfinished tasks: first those that run, then those that wait, in order."""
        with self._lock:
            return sorted(self._tasks.values(), key=lambda task: task.begun is None)

    def delete(self, video_id: str) -> None:
        """Delete a job and its video; cancel it if it is running. Raises Refused if its file cannot be deleted."""
        with self._lock:
            task = self._tasks.get(video_id)
            if task is not None:
                self._metrics.ended(self._route(task), "cancelled")
                if task in self._waiting:
                    self._waiting.remove(task)
                elif task.job.ticket in self._in_flight:
                    self._dispatcher.cancel(task.job.ticket)
                self._end(task, Refused(GONE, status=410, code="deleted"))
        try:
            self._book.remove(video_id)
        except OSError as error:
            process.say(f"video {video_id}: cannot be deleted: {process.one_line(error)}")
            if task is not None:
                self._book.fail(video_id, "deleted", GONE)
            message = "the video could not be deleted; the server's log says why"
            raise Refused(message, status=500, code="storage_failed") from None
        finally:
            self.on_change()

    def work(self, *, until: Callable[[], bool] = lambda: False, look_s: float = STAY_READY_S) -> None:
        """Hand tasks to the dispatcher until `stop` is called and all running tasks are done.

        Also returns once `until` is true, which is checked whenever there was nothing to do for `look_s` seconds.
        """
        while not until():
            with self._lock:
                ready = self._lock.wait_for(self._can_go_on, look_s)
                room = self._dispatcher.capacity - len(self._in_flight)
                batch = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
                for task in batch:
                    task.handed_over = time.perf_counter()
                    self._in_flight[task.job.ticket] = task
                if ready and not batch:
                    return
            if batch:
                self._dispatcher.submit([task.job for task in batch])
            else:
                self._dispatcher.stay_ready()

    def stop(self) -> None:
        """Accept no more jobs, refuse those that wait, and let `work` return when the running ones are done."""
        with self._lock:
            self._stopping = True
            while self._waiting:
                self._give_up(self._waiting.popleft(), stopping())
            self._lock.notify_all()
        self.on_change()

    def fail_all(self) -> None:
        """Answer every waiting client with an error, because the engine has failed."""
        error = Refused("the server has failed; its log says why", status=503, code="server_failed")
        with self._lock:
            self._stopping = True
            for task in list(self._tasks.values()):
                self._give_up(task, error)
        self.on_change()

    def _unheld_waiting(self) -> int:
        return sum(1 for task in self._tasks.values() if not task.held and task.handed_over is None)

    def _can_go_on(self) -> bool:
        if self._stopping:
            return not self._in_flight
        return bool(self._waiting) and len(self._in_flight) < self._dispatcher.capacity

    def _enqueue(self, task: Task) -> None:
        if not task.is_over:  # it may have been deleted meanwhile
            self._waiting.append(task)
            self._lock.notify_all()

    def _moved(self, progress: Progress) -> None:
        with self._lock:
            task = self._in_flight.get(progress.ticket)
            if task is None or task.is_over:
                return
            if progress.fragment:
                task.fragments.append(base64.b64decode(progress.fragment))
            else:
                self._advance(task, progress)
        self.on_change()

    def _advance(self, task: Task, progress: Progress) -> None:
        task.steps, task.frames = progress.steps, progress.frames
        if task.begun is None or progress.steps == 0:
            task.begun = time.perf_counter()
            task.fragments.clear()  # those of a failed attempt
            self._book.change(task.video_id, status="in_progress")

    def _made(self, result: FinishedSample) -> None:
        with self._lock:
            task = self._in_flight.pop(result.job.ticket)
            self._lock.notify_all()
        if task.is_over:
            return
        assert task.handed_over is not None
        begin, content = time.perf_counter(), bytes(result.content)
        try:
            if self._book.complete(task.video_id, content) is None:
                return
        except OSError as error:
            process.say(f"video {task.video_id}: cannot be stored: {process.one_line(error)}")
            self._fail(task, "storage_failed", "the video could not be stored; the server's log says why")
            return
        wait = (task.begun or task.handed_over) - task.accepted
        spans = {"wait": wait, **result.spans, "keep": time.perf_counter() - begin}
        self._metrics.made(self._route(task), spans, result.seconds)
        self.forecast.learn(task.workload, result.seconds)
        self._end(task, Outcome(content=content, spans=spans))

    def _lost(self, job: Job, reason: str) -> None:
        with self._lock:
            task = self._in_flight.pop(job.ticket)
            self._lock.notify_all()
        if not task.is_over:
            process.say(f"video {task.video_id}: failed {job.attempt} times: {reason}")
            self._fail(task, "generation_failed", FAILED)

    def _fail(self, task: Task, code: str, message: str) -> None:
        self._metrics.ended(self._route(task), "failed")
        self._book.fail(task.video_id, code, message)
        self._end(task, Refused(message, status=500, code=code))

    def _give_up(self, task: Task, error: Refused) -> None:
        self._metrics.ended(self._route(task), "lost")
        self._book.fail(task.video_id, error.code, error.message)
        self._end(task, error)

    def _end(self, task: Task, outcome: Outcome | Refused) -> None:
        with self._lock:
            if task.is_over:
                return
            task.is_over = True
            self._tasks.pop(task.video_id, None)
        if isinstance(outcome, Outcome):
            task.outcome.set_result(outcome)
        else:
            task.outcome.set_exception(outcome)
        self.on_change()

    def _route(self, task: Task) -> str:
        video: Video | None = self._book.get(task.video_id)
        return video.route if video is not None else "videos"

    def _recipe(self, wanted: Wanted) -> tuple[str, dict[str, object]]:
        """Return the key and identity of everything that decides how the video looks, apart from prompt and seed."""
        setup = self._setup
        negative = setup.workload.negative_prompt if wanted.negative_prompt is None else wanted.negative_prompt
        workload = replace(wanted.workload, negative_prompt=negative)
        if workload not in self._recipes:
            known = identity(setup.recipe, workload, setup.checkpoint)
            self._recipes[workload] = key_of(known), known
        return self._recipes[workload]
