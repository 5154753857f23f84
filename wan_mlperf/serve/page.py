"""The page at `/`, the routes that it uses, and those for operators: /health and /metrics."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import asdict
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from wan_mlperf.serve import body
from wan_mlperf.serve.errors import Refused
from wan_mlperf.serve.guard import COOKIE
from wan_mlperf.serve.live import Live
from wan_mlperf.serve.site import Site

FILE = Path(__file__).with_name("page.html")


def routes(site: Site) -> list[Route]:
    """Return the routes."""
    text = FILE.read_text(encoding="utf-8")
    policy = content_security_policy(text)
    live = Live(site.desk)

    async def page(_request: Request) -> Response:
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    async def session(request: Request) -> Response:
        """Take the token from the page's form and answer with a cookie, which the page's requests then carry."""
        values, _ = await body.read(request)
        token = values.get("token")
        cookie = site.access.session(token) if isinstance(token, str) else None
        if cookie is None:
            raise Refused("token: is not this server's", param="token", status=401, code="invalid_token")
        response = JSONResponse({"ok": True})
        response.set_cookie(COOKIE, cookie, httponly=True, samesite="strict", secure=request.url.scheme == "https")
        return response

    async def about(_request: Request) -> Response:
        workload = asdict(site.setup.workload)
        plan = [
            {name: getattr(step, name) for name in ("expert", "attention", "gemm", "guidance", "guided")}
            | {"step": step.index + 1, "reused": step.source is not None}
            for step in site.setup.plan
        ]
        names = {"recipe": site.setup.recipe.name, "mesh": str(site.setup.shape)}
        return JSONResponse({**names, "workload": workload, "plan": plan, "made_by": dict(site.made_by)})

    async def state(_request: Request) -> Response:
        return JSONResponse(live.state())

    async def events(request: Request) -> Response:
        headers = {"X-Accel-Buffering": "no"}  # nginx would hold events back
        if request.method == "HEAD":  # whose answer has no body, and would never end
            return Response(headers=headers, media_type="text/event-stream")
        return StreamingResponse(live.events(), media_type="text/event-stream", headers=headers)

    async def health(_request: Request) -> Response:
        stopping = site.desk.is_stopping
        return JSONResponse({"status": "stopping" if stopping else "ok"}, 503 if stopping else 200)

    async def metrics(_request: Request) -> Response:
        return Response(site.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return [
        Route("/", page, methods=["GET"]),
        Route("/session", session, methods=["POST"]),
        Route("/about", about, methods=["GET"]),
        Route("/live", state, methods=["GET"]),
        Route("/live/events", events, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
    ]


def content_security_policy(text: str) -> str:
    """Return a policy under which the page runs its own script only, whatever a prompt contains."""
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
            for part in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src data:; media-src 'self'; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
