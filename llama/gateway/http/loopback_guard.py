"""Protects a gateway without keys from the web pages that a local browser shows."""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from llama.gateway.http.authentication import HEALTH_CHECKS, STREAMS, Gateway
from llama.gateway.problems import Problem

_LOOPBACK_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)


class LoopbackGuard:
    """While no key is needed, refuses requests that a web page may have made through a local browser: those
    for another host name (DNS rebinding), and those from pages of other sites."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app, self._gateway = app, gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Health checks must not wait for the database, and have nothing to protect.
        checked = scope["type"] == "http" and scope["path"] not in HEALTH_CHECKS
        if checked and await self._gateway.keys.is_open():
            self._check(scope["path"], Headers(scope=scope))
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if not _LOOPBACK_HOST.fullmatch(host):
            raise _forbidden(
                "The gateway has no keys, so it accepts only requests for localhost, 127.0.0.1 or [::1]. "
                "Use one of these names, or add a key."
            )
        origin, allowed = headers.get("origin"), self._gateway.settings.allowed_origins
        if origin is None or path.startswith(STREAMS) or origin in allowed or "*" in allowed:
            return
        if origin.partition("://")[2].lower() != host.lower():
            raise _forbidden(
                "The gateway has no keys, so it refuses requests from pages of other sites. List the page's "
                "origin in LLAMA_GATEWAY_ALLOWED_ORIGINS, or add a key."
            )


def _forbidden(detail: str) -> Problem:
    return Problem(403, "Forbidden", detail, code="forbidden")
