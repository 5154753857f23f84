"""A server from loading to its end: every rank makes videos; rank 0 also has the queue, the folder and the HTTP server."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Mapping
from types import MappingProxyType

from pydantic_core import to_jsonable_python

from sut import run_record
from wan_mlperf import cli, process, ranks
from wan_mlperf.pipeline import PARTS, Pipeline
from wan_mlperf.preflight import Setup
from wan_mlperf.replicas import dispatch
from wan_mlperf.replicas.dispatch import ServingDispatcher
from wan_mlperf.replicas.messages import Job
from wan_mlperf.replicas.watch import Watch
from wan_mlperf.serve import app, server
from wan_mlperf.serve.book import Book
from wan_mlperf.serve.desk import Desk
from wan_mlperf.serve.encoder import encode
from wan_mlperf.serve.guard import Access
from wan_mlperf.serve.metrics import Metrics
from wan_mlperf.serve.options import Options
from wan_mlperf.serve.site import Site
from wan_mlperf.serve.wanted import Reader

COLLECTIVE_S = 24 * 3600.0  # as in sut/session.py: the watch finds ranks that hang
ANSWERS_S = 5.0  # for sending the last answers


def run(options: Options, setup: Setup, taken: socket.socket | None) -> int:
    """Load and serve until the server is stopped; runs on every rank. `taken` is rank 0's bound port. Return the exit code."""
    with Watch(setup.recipe.faults) as watch:
        book = Book(options.folder)
        if ranks.is_first():
            book.open()
        progress = cli.Progress("loading", PARTS + setup.recipe.warmup_queries)
        engine = Pipeline.load(setup, timeout_s=COLLECTIVE_S, on_part=progress.advance)
        watch.follow(engine.spans)
        for _ in range(setup.recipe.warmup_queries):
            engine.warm_up(1, batch=setup.recipe.offline.batch)
            progress.advance()
        progress.close()

        def fps(job: Job) -> int:
            return int((job.workload or {}).get("fps", setup.workload.fps))

        dispatcher = dispatch.start(engine, watch, pack=lambda frames: frames, encode=encode(fps))
        watch.drains = True
        if engine.mesh.rank:
            dispatcher.serve()
        else:
            assert taken is not None
            made_by = to_jsonable_python(run_record.identity(engine))
            del made_by["checkpoint"]  # it may be a path of this host
            Session(options, setup, watch, dispatcher, book, taken, made_by=made_by).run()
        engine.mesh.close()
    return process.DONE


class Session:
    """Rank 0's part of the server: the book, the queue and the HTTP server.

    `made_by` is what /about says about the model, the recipe, the device and the software.
    """

    def __init__(
        self,
        options: Options,
        setup: Setup,
        watch: Watch,
        dispatcher: ServingDispatcher,
        book: Book,
        taken: socket.socket,
        *,
        made_by: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        self._options, self._watch, self._dispatcher, self._setup = options, watch, dispatcher, setup
        self._book = book
        metrics = Metrics()
        self.desk = Desk(dispatcher, setup, self._book, metrics, most_waiting=options.most_waiting)
        application = app.build(
            Site(
                setup=setup,
                desk=self.desk,
                book=self._book,
                reader=Reader(setup, policy=options.policy, latents=options.latents),
                metrics=metrics,
                access=Access(token=options.token, only_local=options.token is None and server.is_local(taken)),
                made_by=made_by,
            )
        )
        self.server = server.HttpServer(application, taken, open_requests=lambda: application.open_requests)

    def run(self) -> None:
        """Serve until SIGTERM or until the engine fails."""
        self._watch.on_end = self._failed
        self._watch.on_drain = self._drain
        found = self._book.found
        if found.finished or found.lost:
            lost = f", {len(found.lost)} lost when the server ended: {', '.join(found.lost)}" if found.lost else ""
            process.tell(f"{self._options.folder}: {found.finished} finished videos{lost}")
        server.raise_limit_of_files()
        self.server.start()
        process.tell(f"{self._setup.recipe.name}: {self._setup.shape}, ready at {self.server.address}")
        self._dispatcher.run(self.desk.work)
        self._watch.on_end = lambda _reason: None
        self.close()

    def close(self) -> None:
        """Send the last answers and write every job's outcome to the manifest."""
        self.server.await_answers(ANSWERS_S)
        self.server.stop()
        self._book.close()

    def _drain(self) -> None:
        """Handle SIGTERM: accept no more jobs and finish the running ones, within the time that --drain gives."""
        drain_s = self._options.drain_s
        process.say(f"stopping: running videos have {drain_s:g} s to finish")
        self.desk.stop()
        line = f"stopped by SIGTERM: running videos did not finish within {drain_s:g} s"
        timer = threading.Timer(drain_s, self._watch.end, (line, 128 + signal.SIGTERM))
        timer.daemon = True
        timer.start()

    def _failed(self, _reason: str) -> None:
        self.desk.fail_all()
        self.server.await_answers(ANSWERS_S)
        self._book.flush(ANSWERS_S / 2)
