"""Reads the fields of a request's body: JSON, or a form as OpenAI's client sends it."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from starlette.datastructures import UploadFile
from starlette.requests import Request

from wan_mlperf.serve.errors import Refused

MOST_FIELDS = 64


async def read(request: Request) -> tuple[dict[str, Any], bool]:
    """Return the fields, and True if every value is text because it came in a form. Raises Refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await _form(request), True
    return _json(await request.body()), False


async def _form(request: Request) -> dict[str, Any]:
    values: dict[str, Any] = {}
    async with request.form(max_files=MOST_FIELDS, max_fields=MOST_FIELDS) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                raise Refused(f"{name[:80]}: is a file; this server makes videos from text only", param=name[:80])
            if name in values:
                raise Refused(f"{name[:80]}: is given twice", param=name[:80])
            values[name] = value
    return values


def _json(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body, parse_constant=_no_number, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:120]
        raise Refused(f"the body is not JSON ({reason})", code="invalid_json") from None
    if not isinstance(values, dict):
        raise Refused("the body is not a JSON object", code="invalid_json")
    return values


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name is given twice")
    return values
