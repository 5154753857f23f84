"""Checks every request before its route: who may use the server, from which page, and how much they may send."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wan_mlperf.serve.errors import Refused, internal
from wan_mlperf.serve.metrics import Metrics

COOKIE = "wan_mlperf_session"
OPEN = ("/", "/health", "/session")  # need no token: they reveal nothing about the users' videos
BODY_BYTES = 256 * 1024
BODY_S = 30.0
# How much of an oversized body is read and discarded; otherwise its sender would never see the answer.
DISCARDED_BYTES = 8 * 1024 * 1024
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may use the server: everyone who reaches the port, or holders of the token. `only_local`: only as localhost."""

    token: str | None
    only_local: bool

    def session(self, token: str) -> str | None:
        """Return the session cookie for the right token, None for a wrong one."""
        if self.token is None or not hmac.compare_digest(token.encode(errors="surrogatepass"), self.token.encode()):
            return None
        return hashlib.sha256(f"session of {self.token}".encode()).hexdigest()

    def check(self, path: str, headers: Headers) -> None:
        """Raise Refused for a request that is not allowed."""
        host = headers.get("host", "")
        if self.only_local and not _is_local(host):
            # DNS rebinding: a page of another site could give its own name this host's address, and so read the answers.
            raise Refused("this server answers to localhost only", status=403, code="host_not_allowed")
        origin = headers.get("origin")
        if (origin is not None and not _is_of(origin, host)) or headers.get("sec-fetch-site") == "cross-site":
            raise Refused("pages of other sites may not use this server", status=403, code="origin_not_allowed")
        if self.token is None or path in OPEN:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        session = self.session(self.token)
        assert session is not None
        by_header = kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token.encode())
        cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        if not by_header and not hmac.compare_digest(cookie.encode(), session.encode()):
            message = "this server requires a token: Authorization: Bearer ..."
            raise Refused(message, status=401, code="invalid_token", www_authenticate="Bearer")


class Guard:
    """ASGI middleware. A request that it refuses never reaches a route."""

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics) -> None:
        self._app, self._access, self._metrics = app, access, metrics
        self.open_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if message["status"] >= 400:
                    self._metrics.refused(message["status"])
            await send(message)

        try:
            self._access.check(scope["path"], Headers(scope=scope))
            _check_length(Headers(scope=scope))
        except Refused as refused:
            await refused.answer()(scope, receive, send_with_headers)
            return
        except Exception:
            await internal().answer()(scope, receive, send_with_headers)
            raise  # for the log, as Starlette does it
        self.open_requests += 1
        try:
            await self._app(scope, _Body(receive), send_with_headers)
        finally:
            self.open_requests -= 1


class _Body:
    """ASGI's `receive` with limits on a body's length and on the time all of it takes."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._length = 0
        self._until: float | None = None
        self._is_complete = False

    async def __call__(self) -> Message:
        if self._is_complete:
            return await self._receive()
        if self._until is None:
            self._until = asyncio.get_running_loop().time() + BODY_S
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
                while self._counts(message):  # too long: read on, up to DISCARDED_BYTES
                    message = await self._receive()
        except TimeoutError:
            self._is_complete = True
            raise Refused(f"the body did not arrive within {BODY_S:.0f} s", status=408, code="timeout") from None
        if self._length > BODY_BYTES:
            self._is_complete = True
            raise _too_long()
        return message

    def _counts(self, message: Message) -> bool:
        self._length += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        return BODY_BYTES < self._length <= DISCARDED_BYTES and not self._is_complete


def _check_length(headers: Headers) -> None:
    """Refuse a body by the length that it declares. Its sender may wait for this answer (Expect: 100-continue)."""
    length = headers.get("content-length", "")
    if length.isdecimal() and len(length) <= 20 and int(length) > BODY_BYTES:
        raise _too_long()


def _too_long() -> Refused:
    return Refused(f"the body is too long; allowed: {BODY_BYTES:,} bytes", status=413, code="body_too_long")


def _split(url: str) -> SplitResult | None:
    """Return the parts of a URL, None if it is malformed, such as `http://[`."""
    try:
        return urlsplit(url)
    except ValueError:
        return None


def _is_of(origin: str, host: str) -> bool:
    parts = _split(origin)
    return parts is not None and parts.netloc == host


def _is_local(host: str) -> bool:
    parts = _split(f"//{host}")
    name = (parts and parts.hostname) or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
