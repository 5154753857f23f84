"""The HTTP server: its port, taken before anything is loaded, and uvicorn in a thread of rank 0."""

from __future__ import annotations

import asyncio
import ipaddress
import resource
import socket
import threading
import time
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from wan_mlperf import process
from wan_mlperf.errors import BadInput

BACKLOG = 4096  # MLCommons' client opens about 7,000 connections at once before its first request
FILES = 16384
KEEP_ALIVE_S = 75  # MLCommons' client drops idle connections after 4 s; a request on one that the server closed first fails
STOP_S = 5
TURNS, TURN_S = 10, 0.005


def bind(host: str, port: int) -> socket.socket:
    """Bind the port without listening: connections are refused until the model is ready. Raises BadInput."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        return taken
    except (OSError, UnicodeError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        named = f"--host {host} --port {port}"
        raise BadInput(f"{named}: cannot be used ({reason}); allowed: an address of this host, a free port") from None


def is_local(taken: socket.socket) -> bool:
    """True if the bound address can be reached from this host only, however --host spelled it."""
    return ipaddress.ip_address(taken.getsockname()[0].partition("%")[0]).is_loopback


def raise_limit_of_files() -> None:
    """Raise this process's limit on open files, and so on connections, to the hard limit; print a note if that is low."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if most == resource.RLIM_INFINITY else most
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    if wanted < FILES:
        process.say(f"note: this process may open {wanted} files; MLCommons' client opens over 7,000 connections (ulimit -n)")


class HttpServer:
    """Serves `app` on a bound socket in a separate thread. `open_requests` returns the number of requests in progress."""

    def __init__(self, app: ASGIApp, taken: socket.socket, *, open_requests: Callable[[], int]) -> None:
        self._socket, self._open_requests = taken, open_requests
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=STOP_S,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    @property
    def address(self) -> str:
        """The server's URL."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        """Start listening; return once connections are accepted."""
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.005)

    def await_answers(self, timeout_s: float) -> None:
        """Wait, for `timeout_s` at most, until every open request is answered, including those not read yet."""
        until = time.monotonic() + timeout_s
        while self._thread.is_alive() and (left := until - time.monotonic()) > 0:
            seen = asyncio.run_coroutine_threadsafe(self._most_open_requests(), self._loop)
            try:
                if not seen.result(left):
                    return
            except TimeoutError:
                return

    def stop(self) -> None:
        """Close the port, finish the open answers and end the thread."""
        self._server.should_exit = True
        self._thread.join(STOP_S + 2)

    async def _most_open_requests(self) -> int:
        """Return the most requests open in the next turns of the loop: a new connection takes a few turns to become one."""
        most = self._open_requests()
        for _ in range(TURNS):
            await asyncio.sleep(TURN_S)
            most = max(most, self._open_requests())
        return most

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._server.serve(sockets=[self._socket])
