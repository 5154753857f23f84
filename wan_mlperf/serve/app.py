"""The ASGI application: all routes, behind the guard, with every error in OpenAI's form."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from wan_mlperf.serve import endpoints, openai, page
from wan_mlperf.serve.errors import Refused, internal
from wan_mlperf.serve.guard import Guard
from wan_mlperf.serve.site import Site


def build(site: Site) -> Guard:
    """Return the application."""
    routes = [*endpoints.routes(site), *openai.routes(site), *page.routes(site)]
    handlers: dict[Any, Any] = {Refused: _refused, HTTPException: _http, ClientDisconnect: _gone, Exception: _bug}
    app: ASGIApp = Starlette(routes=routes, exception_handlers=handlers)
    return Guard(app, site.access, site.metrics)


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.answer()


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:80]}: {error.detail}"
    refused = Refused(message, status=error.status_code, code=error.detail.lower().replace(" ", "_")[:40])
    refused.headers = dict(error.headers or {})
    return refused.answer()


async def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)  # the client is gone


async def _bug(_request: Request, _error: Exception) -> Response:
    return internal().answer()
