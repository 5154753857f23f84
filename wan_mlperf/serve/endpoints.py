"""The routes of MLCommons' endpoints client: one video per request; the answer is sent when the video is finished."""

from __future__ import annotations

import base64

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from wan_mlperf.serve.site import Site, endpoints_request, finished, timing

CLIENT_GONE = 499  # nobody receives it; 499 is nginx's code for a client that has gone


def routes(site: Site) -> list[Route]:
    """`POST /v1/videos/generations` and `/v1/videos/sync`."""

    async def generations(request: Request) -> Response:
        """Answer with exactly two fields: with any other field, even null, the client counts the sample as failed."""
        wanted, fields = await endpoints_request(site, request)
        task = site.desk.accept(wanted, route="generations", held=True)
        outcome = await finished(site, request, task)
        if outcome is None:
            return Response(status_code=CLIENT_GONE)
        answer = {"video_id": task.video_id}
        if fields.response_format == "video_bytes":
            answer["video_bytes"] = base64.b64encode(outcome.content).decode()
        else:
            answer["video_path"] = str(site.book.folder / f"{task.video_id}.mp4")
        return JSONResponse(answer, headers=timing(outcome))

    async def sync(request: Request) -> Response:
        """Answer with the MP4 itself; its id, for a later DELETE, is in the header X-Video-Id."""
        wanted, _ = await endpoints_request(site, request)
        task = site.desk.accept(wanted, route="sync", held=True)
        outcome = await finished(site, request, task)
        if outcome is None:
            return Response(status_code=CLIENT_GONE)
        headers = {"X-Video-Id": task.video_id, **timing(outcome)}
        return Response(outcome.content, media_type="video/mp4", headers=headers)

    async def only_post(_request: Request) -> Response:
        raise HTTPException(405, headers={"Allow": "POST"})

    return [
        Route("/v1/videos/generations", generations, methods=["POST"]),
        Route("/v1/videos/sync", sync, methods=["POST"]),
        # Without these two, /v1/videos/{video_id} would look for videos of these names.
        Route("/v1/videos/generations", only_post, methods=["GET", "DELETE"]),
        Route("/v1/videos/sync", only_post, methods=["GET", "DELETE"]),
    ]
