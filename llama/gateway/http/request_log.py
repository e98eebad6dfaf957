"""Logs and counts every HTTP request when its response has ended.

Knows the route of a request, never its path: the path of a stream is a secret. Health checks and scrapes are
left out unless they are refused, because they come every few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.gateway.http.authentication import HEALTH_CHECKS, METRICS
from llama.gateway.http.disconnect import CLIENT_LEFT
from llama.gateway.logs import REQUESTS
from llama.gateway.metrics.recorder import Metrics

_LEFT_OUT = (*HEALTH_CHECKS, METRICS)


class NoteRoute:
    """The innermost layer: notes which route the application has chosen."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            if scope["type"] == "http":
                scope["state"]["route"] = getattr(scope.get("route"), "path", None)


class RequestLog:
    """The outermost layer. It reads what the layers below put into the state of a request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        state = scope.setdefault("state", {})
        response = _Response(send)
        began = time.perf_counter()
        try:
            await self._app(scope, receive, response.send)
        finally:
            if "problem" in state or state.get("route") not in _LEFT_OUT:
                self._ended(scope["method"], state, response, time.perf_counter() - began)

    def _ended(self, method: str, state: dict[str, Any], response: _Response, seconds: float) -> None:
        route, key = state.get("route"), state.get("key")
        self._metrics.responded(method, route, response.status)
        if "problem" in state:
            self._metrics.refused(response.status, state["problem"])
        fields = {
            "event": "request",
            "request_id": state.get("request_id"),
            "method": method,
            "route": route,
            "status": response.status,
            "problem": state.get("problem"),
            "milliseconds": round(seconds * 1000, 1),
            "bytes": response.size,
            "complete": response.complete and response.status != CLIENT_LEFT,
            "key": key.name if key is not None else None,
        }
        REQUESTS.info("%s %s: %d", method, route or "(no route)", response.status, extra=fields)


class _Response:
    """Passes a response on, and remembers its status and its size."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status, self.size = 0, 0
        self.complete = False
        """Whether it was sent to its end."""

    def send(self, message: Message) -> Awaitable[None]:
        """Not a coroutine function, which would take longer: this is called for every piece of an answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.size += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
        return self._send(message)
