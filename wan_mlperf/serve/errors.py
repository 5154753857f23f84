"""Refused requests: the HTTP status, and the error body in OpenAI's form."""

from __future__ import annotations

from starlette.responses import JSONResponse

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(Exception):
    """Raised for a request that is answered with `status` 4xx or 5xx. `param` names the wrong field, if it was one."""

    def __init__(
        self, message: str, *, param: str | None = None, status: int = 400, code: str = "invalid_value", **headers: str
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def answer(self) -> JSONResponse:
        """Return the response to send."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        body = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": body}, self.status, headers=self.headers)


def not_found(what: str) -> Refused:
    """Return the error for something that does not exist."""
    return Refused(f"there is no {what}", status=404, code="not_found")


def internal() -> Refused:
    """Return the error for a bug of ours."""
    return Refused("internal error; see the server's log", status=500, code="internal_error")


def stopping() -> Refused:
    """Return the error for a server that accepts no more jobs."""
    return Refused("the server is stopping", status=503, code="server_stopping", retry_after="10")
