"""No rank waits forever: every rank writes heartbeats to the job's store and reads the others'.

The first rank to see that a rank died, stopped or failed claims the shutdown and prints the one message; all others see the claim
and exit silently. A stopped process on the same host is killed. The watch runs in threads, because the main thread may be in a
collective that never returns.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

from wan_mlperf import files, process, ranks
from wan_mlperf.errors import BadInput, Failed
from wan_mlperf.recipe import Faults
from wan_mlperf.replicas.signals import Signals
from wan_mlperf.replicas.status import Note, is_alive, whereabouts
from wan_mlperf.replicas.store import connect
from wan_mlperf.spans import Spans

ON_END_S = 10.0  # how long rank 0 may take to write down how far it got
# Words of an error that another rank's death causes.
COLLECTIVE = ("gloo", "nccl", "connection closed", "connection reset", "connection was", "broken pipe", "tcpstore")


class Watch:
    """This rank's watch. Enter it before the groups are started. An exception that leaves the block ends the whole job.

    `on_end` is called once on rank 0, with the reason, before it exits early. With `drains`, SIGTERM on any rank ends nothing;
    instead `on_drain` is called once on rank 0, from one of the watch's threads.
    """

    def __init__(self, faults: Faults) -> None:
        self.on_end: Callable[[str], object] = lambda _reason: None
        self.on_drain: Callable[[], object] | None = None
        self.drains = False
        self._faults = faults
        self._limit_s: float = faults.start_s
        self._progress: Callable[[], int] = lambda: 0
        self._note = Note()
        self._trouble = ""
        self._rank, self._world = ranks.rank(), ranks.world_size()
        self._host, self._node, self._parent = socket.gethostname(), ranks.node(), os.getppid()
        self._tick_s = min(1.0, faults.dead_s / 5)
        self._active = ranks.under_torchrun()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._leaving = threading.Lock()
        self._beats = 0
        self._peers: dict[int, dict[str, Any]] = {}
        self._notes: dict[int, Note] = {}
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._ticked = time.monotonic()

    def __enter__(self) -> Watch:
        if not self._active:
            return self
        self._store = connect("watch", timeout_s=self._faults.dead_s)
        self._signals = Signals()
        self._show()
        for loop in (self._look_around, self._look_inside):
            self._threads.append(threading.Thread(target=loop, name=f"watch-{loop.__name__}", daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        if error is not None:
            self.fail(error)
        self._closed.set()
        for thread in self._threads:  # one that is still inside the store when Python ends aborts the process
            thread.join(self._faults.dead_s)
        if self._active:
            self._store.set(f"heartbeat/{self._rank}", json.dumps({"done": True}))
            self._signals.close()

    def follow(self, spans: Spans) -> None:
        """Take this rank's stage, and whether it makes progress, from these spans from now on."""
        spans.on_stage = self._note.set_stage
        self._progress = spans.progress

    def begin(self, sample: str, *, patience: float = 1.0) -> None:
        """This rank now works on a sample, and counts as hung without progress. `patience`: how many times longer it may take."""
        self._limit_s = self._faults.hang_s * patience
        self._note.set("begin", sample)

    def idle(self) -> None:
        """This rank waits for work, for as long as it takes."""
        self._trouble = ""
        self._note.set("idle", "")

    def trouble(self, error: str) -> None:
        """This rank has an error, and asks its replica's other ranks for theirs. They may hang in a collective."""
        self._trouble = error
        self._limit_s = min(self._faults.dead_s, self._faults.hang_s)

    @property
    def where(self) -> str:
        """This rank's rank, host, stage and sample in words."""
        return whereabouts(self._heartbeat())

    @staticmethod
    def is_collective(error: BaseException) -> bool:
        """True for an error in a collective, which is a sign that another rank has died."""
        return not isinstance(error, Failed) and any(word in str(error).lower() for word in COLLECTIVE)

    def fail(self, error: BaseException, *, stage: str | None = None, sample: int | None = None) -> NoReturn:
        """End the whole job because of an error on this rank, or because of the death of another rank that caused it.

        `stage` and `sample` say where, for a thread that does something else than the rank's main thread.
        """
        if not self._active:
            raise error
        if isinstance(error, BadInput):
            self.end(f"error: {process.one_line(error)}", process.BAD_INPUT)
        if self.is_collective(error):
            # Most likely another rank is the cause. It is found by its missing heartbeats, after dead_s at the latest.
            until = time.monotonic() + self._faults.dead_s + 2 * self._tick_s
            while time.monotonic() < until:
                self._end_if_claimed()
                self._bury_local_dead()
                time.sleep(self._tick_s / 5)
        last = traceback.extract_tb(error.__traceback__)[-1:]
        line = "".join(f" (at {os.path.basename(one.filename)}:{one.lineno})" for one in last)
        if os.environ.get("WAN_MLPERF_TRACEBACK"):
            traceback.print_exception(error)
        heartbeat = self._heartbeat()
        here = whereabouts(heartbeat if stage is None else {**heartbeat, "stage": stage, "sample": str(sample)})
        why = (process.why(error) or process.one_line(error))[:500]
        self.end(f"failed: {here}: {type(error).__name__}: {why}{line}", process.FAILED)

    def end(self, line: str, code: int, victim: int | None = None) -> NoReturn:
        """End the whole job at once, everywhere, with this line and code, unless another rank was first."""
        if self._active:
            try:
                first = int(self._store.add("claims", 1)) == 1
                if first:
                    self._store.set("end", json.dumps({"line": line, "code": code, "node": self._node, "victim": victim}))
                else:
                    self._await_claim()
            except Exception:  # the store is gone, so nobody can be told
                first = True
        self._leave(line, code, say=True)

    def _leave(self, line: str, code: int, *, say: bool) -> NoReturn:
        if not self._leaving.acquire(blocking=False):
            time.sleep(2 * ON_END_S)  # another thread is already on its way out
        if say:
            process.say(line)
        if self._rank == 0:
            writer = threading.Thread(target=self.on_end, args=(line,), daemon=True)
            writer.start()
            writer.join(ON_END_S)
        process.leave(code)

    def _await_claim(self) -> None:
        until = time.monotonic() + self._faults.dead_s
        while time.monotonic() < until:
            self._end_if_claimed()
            time.sleep(0.02)

    def _end_if_claimed(self) -> None:
        if not self._store.check(["end"]):
            return
        claim = json.loads(self._store.get("end"))
        self._kill(claim["victim"])
        # Printed once per host: by the rank that claimed, and on other hosts by their first rank.
        self._leave(claim["line"], claim["code"], say=claim["node"] != self._node and ranks.local_rank() == 0)

    def _kill(self, rank: int | None) -> None:
        peer = self._peers.get(-1 if rank is None else rank)
        if peer and peer["node"] == self._node and is_alive(peer["process"], self._parent):
            os.kill(peer["process"], signal.SIGKILL)

    def _heartbeat(self) -> dict[str, Any]:
        return {
            "rank": self._rank,
            "host": self._host,
            "node": self._node,
            "process": os.getpid(),
            "stage": self._note.stage,
            "sample": self._note.sample,
            "note": self._note.descriptor,
            "number": self._beats,
        }

    def _where_was(self, rank: int) -> str:
        """Where another rank was last: from its memory if it is on this host, else from its last heartbeat."""
        note = self._notes.get(rank)
        return whereabouts({**self._peers[rank], **({"stage": note.stage, "sample": note.sample} if note else {})})

    def _show(self) -> None:
        self._beats += 1
        self._store.set(f"heartbeat/{self._rank}", json.dumps(self._heartbeat()))

    def _look_around(self) -> None:
        """Thread: write heartbeats and read those of the others."""
        last = time.monotonic()
        while not self._closed.wait(self._tick_s):
            now = time.monotonic()
            if now - last > 3 * self._tick_s:
                self._seen.clear()  # this process itself was stopped: nobody's age is known
            last = now
            try:
                self._end_if_claimed()
                self._show()
                self._read_heartbeats(now)
                self._drain_if_asked()
            except Exception as error:
                if not self._closed.is_set():
                    address = ":".join(map(str, ranks.master() or ("?",)))
                    why = process.one_line(error)[:120]
                    line = f"failed: {self.where}: lost the connection to the job's store at {address} ({why})"
                    self._leave(line, process.FAILED, say=True)
            self._ticked = time.monotonic()

    def _read_heartbeats(self, now: float) -> None:
        for rank in range(self._world):
            key = f"heartbeat/{rank}"
            if rank == self._rank or (rank not in self._seen and not self._store.check([key])):
                continue
            value = self._store.get(key)
            before, since = self._seen.get(rank, (b"", now))
            if value != before:
                self._seen[rank] = (value, now)
                self._peers[rank] = json.loads(value)
                if rank not in self._notes and self._peers[rank].get("node") == self._node:
                    self._notes[rank] = Note(self._peers[rank]["process"], self._peers[rank]["note"])
            elif now - since > self._faults.dead_s and "done" not in self._peers[rank]:
                silence = f"no heartbeat for {now - since:.0f} s (dead, stopped or cut off)"
                self._kill(rank)
                self.end(f"failed: {self._where_was(rank)}: {silence}", process.FAILED, victim=rank)

    def _look_inside(self) -> None:
        """Thread: watch for signals, the launcher's death, a silent store, and a rank that makes no progress."""
        mark, moved, last = None, time.monotonic(), time.monotonic()
        while not self._closed.is_set():
            numbers = self._signals.wait(self._tick_s)
            now = time.monotonic()
            if now - last > 3 * self._tick_s:
                self._ticked = moved = now  # this process itself was stopped
            last = now
            for number in numbers:
                self._signalled(number)
            if os.getppid() != self._parent:
                files.adopt_job()
                self._leave(
                    f"failed: {self.where}: the process that started this rank is gone", process.FAILED, say=self._rank == 0
                )
            if now - self._ticked > self._faults.dead_s + 2 * self._tick_s:
                line = f"failed: {self.where}: no answer from the job's store for {now - self._ticked:.0f} s"
                self._leave(line, process.FAILED, say=True)
            current = (self._note.sample, self._note.stage, self._progress())
            if current != mark or not self._note.sample:
                mark, moved = current, now
            elif now - moved > self._limit_s:
                reason = (
                    self._trouble
                    or f"{self.where}: no progress for {now - moved:.0f} s (it hangs, or faults.hang_s is too short)"
                )
                self.end(f"failed: {reason}", process.FAILED)

    def _drain_if_asked(self) -> None:
        if self._rank == 0 and self.on_drain is not None and self._store.check(["drain"]):
            drain, self.on_drain = self.on_drain, None
            drain()

    def _signalled(self, number: int) -> None:
        """Handle a signal: someone stops the job, or torchrun ends this rank because another one died."""
        name = signal.Signals(number).name
        drains = self.drains and number == signal.SIGTERM
        try:
            self._bury_local_dead(unless=lambda: bool(self._store.check(["stopped"])))
            self._end_if_claimed()
            self._store.set("drain" if drains else "stopped", name)
            if drains:
                return
        except Exception as error:
            name = f"{name} ({process.one_line(error)[:80]})"
        self._leave(f"stopped by {name}: {self.where}", 128 + number, say=self._rank == 0)

    def _bury_local_dead(self, *, unless: Callable[[], bool] = lambda: False) -> None:
        """If a rank of this host died silently, say so for it and end the job."""
        for rank, peer in list(self._peers.items()):
            if "done" in peer or peer["node"] != self._node or is_alive(peer["process"], self._parent):
                continue
            heartbeat = json.loads(self._store.get(f"heartbeat/{rank}"))
            if "done" in heartbeat or unless():
                continue
            self._end_if_claimed()
            self.end(f"failed: {self._where_was(rank)}: the process died (killed, or out of memory)", process.FAILED)
