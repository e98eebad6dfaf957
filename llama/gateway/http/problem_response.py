"""Renders a problem as a response, in the shape of the API that the path belongs to.

`app.py` uses it for what the routes raise, `http/middleware.py` for what is refused before a route is found.
"""

from __future__ import annotations

import re
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from llama.gateway.http.openai_paths import NOT_OFFERED, OFFERED
from llama.gateway.problems import Problem

# fmt: off
_REPLICATE = (
    "account", "collections", "deployments", "hardware", "predictions", "search", "stream", "trainings",
    "webhooks",
)
"""The first parts of the paths that only Replicate's API has."""
# fmt: on
_NOT_IN_CODES = re.compile(r"[^a-z0-9]+")


def problem_response(problem: Problem, path: str) -> Response:
    """Render a problem. `path` has no leading `/v1`. Paths of both APIs, and unknown ones, get one body with
    the members of both."""
    parts = path.strip("/").split("/")
    below_a_model = parts[0] == "models" and len(parts) > 3  # such as /models/{owner}/{name}/predictions
    body, status, media_type = problem.for_both(), problem.status, "application/json"
    if parts[0] in OFFERED or parts[0] in NOT_OFFERED:
        body, status = problem.for_openai(), problem.openai_status
    elif parts[0] in _REPLICATE or below_a_model:
        body, media_type = problem.for_replicate(), "application/problem+json"
    return _ProblemResponse(problem, body, status, media_type)


class _ProblemResponse(JSONResponse):
    """Also puts the problem's code into the request's state, for the log and the metrics."""

    def __init__(self, problem: Problem, body: dict[str, Any], status: int, media_type: str) -> None:
        super().__init__(body, status, problem.headers, media_type)
        self._code = problem.code or _NOT_IN_CODES.sub("_", problem.title.lower())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["problem"] = self._code
        await super().__call__(scope, receive, send)
