"""An error that a client gets, in the shapes of Replicate's and OpenAI's APIs.

Knows statuses and bodies. `http/problem_response.py` chooses the shape by the request's path.
"""

from __future__ import annotations

from typing import Any

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_NO_QUOTA = "insufficient_quota"  # OpenAI uses it as the code and as the type


class Problem(Exception):
    """A request that is refused. `code` and `param` are OpenAI's; `members` are further members of
    Replicate's body. The message never quotes a key."""

    def __init__(
        self,
        status: int,
        title: str,
        detail: str,
        *,
        code: str | None = None,
        param: str | None = None,
        members: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        openai_status: int | None = None,
    ) -> None:
        """`openai_status`: the status in OpenAI's API, if it differs."""
        super().__init__(detail)
        self.status, self.title, self.detail = status, title, detail
        self.openai_status = openai_status or status
        self.code, self.param = code, param
        self.members, self.headers = members or {}, headers or {}

    def for_replicate(self) -> dict[str, Any]:
        """Problem JSON (RFC 9457)."""
        return {"title": self.title, "detail": self.detail, "status": self.status, **self.members}

    def for_openai(self) -> dict[str, Any]:
        kind = _OPENAI_TYPES.get(
            self.openai_status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        if self.code == _NO_QUOTA:
            kind = _NO_QUOTA
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def for_both(self) -> dict[str, Any]:
        return {**self.for_openai(), **self.for_replicate()}


def not_found(detail: str = "The requested resource could not be found.") -> Problem:
    return Problem(404, "Not found", detail, code="not_found")


def internal_error() -> Problem:
    """A fault of the gateway itself, which the log describes."""
    detail = "The gateway failed; its log says why."
    return Problem(500, "Internal server error", detail, code="internal_error")


def not_stored() -> Problem:
    """The database cannot be written."""
    return Problem(
        503,
        "Service unavailable",
        "The gateway cannot store predictions at the moment; its disk may be full. Try again later.",
        code="storage_unavailable",
        headers={"Retry-After": "5"},
    )


def more_than_possible(count: int, limit: str) -> Problem:
    """A request for more choices than a limit ever allows, so a retry cannot succeed."""
    detail = f"The request counts as {count} predictions, but {limit}. Ask for fewer choices at a time."
    return Problem(400, "Bad request", detail, code="invalid_value", param="n")


def throttled(detail: str, seconds: int) -> Problem:
    """Too many requests: try again after some seconds."""
    return Problem(
        429,
        "Too many requests",
        detail,
        code="rate_limit_exceeded",
        members={"retry_after": seconds},
        headers={"Retry-After": str(seconds)},
    )


def over_budget(detail: str) -> Problem:
    """The key's budget is used up. A retry does not help before the next month or a larger budget."""
    return Problem(
        402,
        "Insufficient credit",
        detail,
        code=_NO_QUOTA,
        headers={"x-should-retry": "false"},  # OpenAI's clients would send a request with status 429 again
        openai_status=429,
    )
