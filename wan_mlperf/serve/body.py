"""Reads the fields of a request's body: JSON, or a form as OpenAI's client sends it."""

from __future__ import annotations

import json
from email.message import Message
from typing import Any, NoReturn
from urllib.parse import parse_qsl

from starlette.datastructures import UploadFile
from starlette.requests import Request

from wan_mlperf.serve.errors import Refused

MOST_FIELDS = 64


async def read(request: Request) -> tuple[dict[str, Any], bool]:
    """Return the fields, and True if every value is text because it came in a form. Raises Refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/x-www-form-urlencoded":
        return _urlencoded(await request.body()), True
    if kind == "multipart/form-data":
        return await _multipart(request), True
    return _json(await request.body()), False


def _urlencoded(body: bytes) -> dict[str, Any]:
    """Starlette's own parser reads other bytes than UTF-8 as Latin-1 or replaces them: a prompt would silently change."""
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=MOST_FIELDS)
    except UnicodeDecodeError:
        raise _not_utf8() from None
    except ValueError:
        raise Refused(f"the form has too many fields; allowed: {MOST_FIELDS}", code="invalid_form") from None
    values: dict[str, Any] = {}
    for name, value in pairs:
        _add(values, name, value)
    return values


async def _multipart(request: Request) -> dict[str, Any]:
    body = await request.body()
    kind = Message()
    kind["Content-Type"] = request.headers["content-type"]
    boundary, charset = kind.get_boundary(), kind.get_content_charset("utf-8")
    if charset not in ("utf-8", "utf8"):
        raise _not_utf8()
    # Without its last line the parser would drop the last part.
    if boundary is not None and f"\r\n--{boundary}--".encode(errors="replace") not in b"\r\n" + body:
        raise Refused("the form is cut off: its closing boundary is missing", code="invalid_form")
    values: dict[str, Any] = {}
    async with request.form(max_files=MOST_FIELDS, max_fields=MOST_FIELDS) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                raise Refused(f"{name[:80]}: is a file; this server makes videos from text only", param=name[:80])
            _add(values, name, value)
    try:
        body.decode()  # there are no files in it; the parser takes other bytes for Latin-1
    except UnicodeDecodeError:
        raise _not_utf8() from None
    return values


def _add(values: dict[str, Any], name: str, value: str) -> None:
    if name in values:
        raise Refused(f"{name[:80]}: is given twice", param=name[:80])
    values[name] = value


def _not_utf8() -> Refused:
    return Refused("the form is not valid UTF-8; allowed: text in UTF-8", code="invalid_form")


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
