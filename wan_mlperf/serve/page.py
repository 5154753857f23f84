"""The page at `/`, the routes that it uses, and those for operators: /health and /metrics."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import time
from dataclasses import asdict
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from wan_mlperf.serve import body
from wan_mlperf.serve.desk import Task
from wan_mlperf.serve.errors import Refused
from wan_mlperf.serve.guard import COOKIE
from wan_mlperf.serve.site import Site

FILE = Path(__file__).with_name("page.html")


def routes(site: Site) -> list[Route]:
    """Return the routes."""
    text = FILE.read_text(encoding="utf-8")
    policy = content_security_policy(text)

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

    async def live(_request: Request) -> Response:
        tasks = site.desk.tasks()
        waiting = [task for task in tasks if task.begun is None]
        jobs = [_live(site, task, waiting.index(task) if task in waiting else None) for task in tasks if task.job.watched]
        others = sum(1 for task in tasks if not task.job.watched)
        return JSONResponse({"jobs": jobs, "others": others, "most_waiting": site.desk.most_waiting})

    async def health(_request: Request) -> Response:
        stopping = site.desk.is_stopping
        return JSONResponse({"status": "stopping" if stopping else "ok"}, 503 if stopping else 200)

    async def metrics(_request: Request) -> Response:
        return Response(site.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return [
        Route("/", page, methods=["GET"]),
        Route("/session", session, methods=["POST"]),
        Route("/about", about, methods=["GET"]),
        Route("/live", live, methods=["GET"]),
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


def _live(site: Site, task: Task, place: int | None) -> dict[str, object]:
    """Return a job's state for the page: its step and expert, or its `place` in the queue."""
    forecast, workload = site.desk.forecast, task.workload
    if task.begun is None:
        left = forecast.seconds_to_wait(workload, before=place or 0)
        stage = "waiting"
    else:
        left = forecast.seconds_left(workload, share=task.share, running=time.perf_counter() - task.begun)
        stage = "decoding" if task.steps >= workload.steps else "denoising" if task.steps else "reading the prompt"
    expert = task.plan[task.steps].expert if stage == "denoising" else None
    return {
        "id": task.video_id,
        "prompt": task.job.prompt,
        "place": place,
        "stage": stage,
        "step": task.steps,
        "steps": workload.steps,
        "expert": expert,
        "frames": task.frames,
        "progress": min(99, math.floor(100 * task.share)),
        "seconds_left": None if left is None else round(left, 1),
        "preview": bool(task.fragments),
    }
