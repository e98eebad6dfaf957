"""Finds the key of a request: in its Authorization header, or in the session of the page.

Knows which paths need no key. Knows nothing about what a key may do.
"""

from __future__ import annotations

from typing import Protocol

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from llama.gateway.access.auth import Keys
from llama.gateway.access.sessions import Sessions
from llama.gateway.http.same_origin import check_same_origin
from llama.gateway.settings import GatewaySettings
from llama.gateway.storage.keys import Key

HEALTH_CHECKS = ("/healthz", "/readyz")
STREAMS = "/stream/"
METRICS = "/metrics"
"""Has a key of its own."""
_PAGE = ("/", "/favicon.ico", "/page/session", "/page/login", "/page/logout")
_PAGE_FILES = "/page/static/"


class Gateway(Protocol):
    @property
    def settings(self) -> GatewaySettings: ...
    @property
    def keys(self) -> Keys: ...
    @property
    def sessions(self) -> Sessions: ...


class Authentication:
    """Puts the request's key into its state, or refuses it."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app, self._gateway = app, gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _needs_no_key(scope["path"]):
            scope.setdefault("state", {})["key"] = await key_of(scope, self._gateway)
        await self._app(scope, receive, send)


def _needs_no_key(path: str) -> bool:
    return path in (*HEALTH_CHECKS, METRICS, *_PAGE) or path.startswith((STREAMS, _PAGE_FILES))


async def key_of(scope: Scope, gateway: Gateway) -> Key:
    """Return the key of a request. Its cookies count only if it has no Authorization header.

    Raises Problem: 401 if the request has no valid key, 403 if another site's page uses the session.
    """
    connection = HTTPConnection(scope)
    authorization = connection.headers.get("authorization")
    if authorization is None and not await gateway.keys.is_open():
        key = gateway.sessions.identify(connection.cookies)
        if key is not None:
            check_same_origin(scope, gateway.settings)
            return key
    return await gateway.keys.identify(authorization)
