"""OpenAI's video API: create, retrieve, list, download and delete; plus a stream of a video while it is decoded."""

from __future__ import annotations

import asyncio
import math
import re
import stat
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from wan_mlperf.serve import body
from wan_mlperf.serve.book import Video
from wan_mlperf.serve.errors import Refused, not_found
from wan_mlperf.serve.site import Site
from wan_mlperf.serve.task import Task

POLL_S = 0.05  # how often a stream looks for the next fragment


def routes(site: Site) -> list[Route]:
    """The routes of /v1/videos and /v1/models."""
    api = _Api(site)
    return [
        Route("/v1/videos", api.create, methods=["POST"]),
        Route("/v1/videos", api.list, methods=["GET"]),
        Route("/v1/videos/{video_id}", api.retrieve, methods=["GET"]),
        Route("/v1/videos/{video_id}", api.delete, methods=["DELETE"]),
        Route("/v1/videos/{video_id}/content", api.content, methods=["GET"]),
        Route("/v1/videos/{video_id}/stream", api.stream, methods=["GET"]),
        Route("/v1/models", api.models, methods=["GET"]),
    ]


class _Api:
    def __init__(self, site: Site) -> None:
        self._site = site

    async def create(self, request: Request) -> Response:
        values, text = await body.read(request)
        wanted, _ = await run_in_threadpool(self._site.reader.read, values, "openai", text=text)
        task = await run_in_threadpool(self._site.desk.accept, wanted, route="videos", held=False)
        return _answer(self._site, _known(self._site, task.video_id))

    async def list(self, request: Request) -> Response:
        after, limit, order = (request.query_params.get(name) for name in ("after", "limit", "order"))
        if order not in (None, "asc", "desc"):
            raise Refused(f"order: {order[:80]!r} is not allowed; allowed: asc, desc", param="order")
        digits = "20" if limit is None else limit.lstrip("0")  # int() refuses thousands of digits
        if not re.fullmatch("[0-9]{1,3}", digits) or int(digits) > 100:
            assert limit is not None
            raise Refused(f"limit: {limit[:80]!r} is not allowed; allowed: 1 to 100", param="limit")
        try:
            videos, more = self._site.book.page(after=after, limit=int(digits), newest_first=order != "asc")
        except KeyError:
            raise Refused(f"after: there is no video {(after or '')[:80]!r}", param="after") from None
        data = [video_object(self._site, video) for video in videos]
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return JSONResponse({"object": "list", "data": data, **ends, "has_more": more})

    async def retrieve(self, request: Request) -> Response:
        return _answer(self._site, _asked(self._site, request))

    async def delete(self, request: Request) -> Response:
        video = _asked(self._site, request)
        await run_in_threadpool(self._site.desk.delete, video.id)
        return JSONResponse({"id": video.id, "object": "video.deleted", "deleted": True})

    async def content(self, request: Request) -> Response:
        video = _asked(self._site, request)
        variant = request.query_params.get("variant", "video")
        if variant != "video":
            raise Refused(f"variant: {variant[:80]!r} is not available; allowed: video", param="variant")
        if video.status != "completed":
            raise Refused(f"the video is not finished: its status is {video.status}", status=404, code="video_not_ready")
        try:
            found = await run_in_threadpool(self._site.book.path(video).stat)
        except OSError:  # the user has deleted the file
            raise not_found(f"file of video {video.id}") from None
        if not stat.S_ISREG(found.st_mode):
            raise not_found(f"file of video {video.id}")
        if request.headers.get("range", "bytes").partition("=")[0].strip().lower() != "bytes":  # RFC 9110, 14.2: ignored
            request.scope["headers"] = [item for item in request.scope["headers"] if item[0] != b"range"]
        return _File(
            self._site.book.path(video),
            media_type="video/mp4",
            filename=video.file,
            content_disposition_type="inline",
            stat_result=found,
        )

    async def stream(self, request: Request) -> Response:
        video = _asked(self._site, request)
        task = self._site.desk.task(video.id)
        if video.status == "completed":
            return RedirectResponse(f"/v1/videos/{video.id}/content")
        if task is None or not task.job.preview:
            raise not_found(f"stream of video {video.id}")
        return StreamingResponse(_fragments(task), media_type="video/mp4")

    async def models(self, _request: Request) -> Response:
        model = {"id": self._site.model, "object": "model", "created": 0, "owned_by": "wan_mlperf"}
        return JSONResponse({"object": "list", "data": [model]})


class _File(FileResponse):
    """A file that is open before the answer begins, and whose errors have OpenAI's form. Raises Refused."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message | None = None
        refused: Refused | None = None

        async def send_once_open(message: Message) -> None:
            nonlocal start, refused
            if refused is not None:
                return
            if message["type"] == "http.response.start":
                start, refused = message, _refused_range(message)
                return
            if start is not None:
                begin, start = start, None
                await send(begin)
            await send(message)

        try:
            await super().__call__(scope, receive, send_once_open)
        except OSError:
            if start is None:
                raise
            raise not_found(f"file {self.filename} that can be read") from None
        if refused is not None:
            raise refused


def _refused_range(start: Message) -> Refused | None:
    """Return the error in place of Starlette's plain text."""
    if start["status"] == 416:
        size = Headers(raw=start["headers"])["content-range"]
        return Refused("Range: is not in the file", status=416, code="invalid_range", content_range=size)
    if start["status"] == 400:
        return Refused("Range: is malformed; allowed: such as bytes=0-99", code="invalid_range")
    return None


def video_object(site: Site, video: Video) -> dict[str, object]:
    """Return OpenAI's video object."""
    task = site.desk.task(video.id)
    progress = 100 if video.status == "completed" else min(99, math.floor(100 * task.share)) if task is not None else 0
    error = None if video.error is None else {"code": video.error[0], "message": video.error[1]}
    return {
        "id": video.id,
        "object": "video",
        "created_at": int(video.created_at),
        "status": video.status,
        "progress": progress,
        "model": site.model,
        "size": video.size,
        "seconds": video.seconds,
        "prompt": video.prompt,
        "completed_at": None if video.completed_at is None else int(video.completed_at),
        "expires_at": None,
        "error": error,
        "remixed_from_video_id": None,
    }


def _answer(site: Site, video: Video) -> Response:
    """Answer with the video object and, while it is unfinished, when to poll again."""
    headers = {}
    if not video.is_over:
        task = site.desk.task(video.id)
        seconds = site.desk.forecast.seconds(task.workload) if task is not None else None
        headers["openai-poll-after-ms"] = str(int(1e3 * min(5.0, max(0.1, (seconds or 2.0) / 20))))
    return JSONResponse(video_object(site, video), headers=headers)


def _asked(site: Site, request: Request) -> Video:
    return _known(site, request.path_params["video_id"])


def _known(site: Site, video_id: str) -> Video:
    video = site.book.get(video_id)
    if video is None:
        raise not_found(f"video {video_id[:80]!r}")
    return video


async def _fragments(task: Task) -> AsyncIterator[bytes]:
    """Yield the preview's fragments as they arrive."""
    sent = 0
    while True:
        over = task.is_over  # read before the fragments, so that none is missed
        while sent < len(task.fragments):
            yield task.fragments[sent]
            sent += 1
        if over:
            return
        await asyncio.sleep(POLL_S)
