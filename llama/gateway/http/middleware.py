"""What happens to every request before a route is found: paths, request ids, CORS, keys and limits.

Each class is one ASGI layer, and `wrap` puts them together. Knows nothing about the routes, except which
paths need no key.
"""

from __future__ import annotations

import re
import secrets
from typing import Protocol
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.gateway.access.auth import Keys
from llama.gateway.http.problem_response import problem_response
from llama.gateway.problems import Problem, internal_error
from llama.gateway.settings import GatewaySettings

_WITHOUT_KEY = ("/healthz", "/readyz")
_STREAMS = "/stream/"
_EXPOSED_HEADERS = ("x-request-id", "retry-after")
_LOOPBACK_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class Gateway(Protocol):
    @property
    def settings(self) -> GatewaySettings: ...
    @property
    def keys(self) -> Keys: ...


def wrap(app: ASGIApp, gateway: Gateway) -> ASGIApp:
    """Put all layers around the app. The gateway's keys must be loaded when the first request comes."""
    settings = gateway.settings
    app = BodyLimit(app, settings.max_body)
    app = Authentication(app, gateway)
    app = LoopbackGuard(app, gateway)
    app = ProblemResponses(app)
    app = Cors(app, settings.allowed_origins)  # outside, so that a page can read the problems
    app = Paths(app)
    return RequestIds(app)


class RequestIds:
    """Sends `x-request-id` with every response: the client's own if it is plain, otherwise a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        return await self._app(scope, receive, send_with_id)


class Paths:
    """Gives each resource one path. Clients disagree about whether a base URL ends with `/v1`, so up to
    two `/v1` are removed from the start of a path. Doubled and trailing slashes are removed, too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = plain_path(scope["path"])
            scope = {**scope, "path": path, "raw_path": quote(path).encode()}
        await self._app(scope, receive, send)


def plain_path(path: str) -> str:
    """Return a decoded path as the routes have it: `/v1/models/` becomes `/models`."""
    parts = [part for part in path.split("/") if part]
    for _ in range(2):
        if parts[:1] == ["v1"]:
            del parts[0]
    return "/" + "/".join(parts)


class Cors:
    """Lets web pages of the allowed origins use the API, and every web page read a stream, whose URL is a
    secret. Preflight requests are handled here, because they never have a key."""

    def __init__(self, app: ASGIApp, allowed_origins: tuple[str, ...]) -> None:
        self._streams = _cors(app, ("*",))
        self._others = _cors(app, allowed_origins) if allowed_origins else app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        of_stream = scope["type"] == "http" and scope["path"].startswith(_STREAMS)
        await (self._streams if of_stream else self._others)(scope, receive, send)


def _cors(app: ASGIApp, origins: tuple[str, ...]) -> ASGIApp:
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("*",),
        allow_headers=("*",),
        allow_private_network=True,  # a gateway on loopback or in an office, used from a public page
        expose_headers=_EXPOSED_HEADERS,
    )


class ProblemResponses:
    """Renders the problems that the layers below raise, and any other error as a problem with status 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Problem as problem:
            if started:
                raise
            await problem_response(problem, scope["path"])(scope, receive, send)
        except Exception:
            if not started:
                await problem_response(internal_error(), scope["path"])(scope, receive, send)
            raise  # the server logs it


class LoopbackGuard:
    """While no key is needed, refuses requests that a web page may have made through a local browser: those
    for another host name (DNS rebinding), and those from pages of other sites."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app, self._gateway = app, gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Health checks must not wait for the database, and have nothing to protect.
        checked = scope["type"] == "http" and scope["path"] not in _WITHOUT_KEY
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
        if origin is None or path.startswith(_STREAMS) or origin in allowed or "*" in allowed:
            return
        if origin.partition("://")[2].lower() != host.lower():
            raise _forbidden(
                "The gateway has no keys, so it refuses requests from pages of other sites. List the page's "
                "origin in LLAMA_GATEWAY_ALLOWED_ORIGINS, or add a key."
            )


def _forbidden(detail: str) -> Problem:
    return Problem(403, "Forbidden", detail, code="forbidden")


class Authentication:
    """Puts the request's key into its state, or refuses it. Streams and health checks need no key."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app, self._gateway = app, gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _needs_no_key(scope["path"]):
            authorization = Headers(scope=scope).get("authorization")
            scope.setdefault("state", {})["key"] = await self._gateway.keys.identify(authorization)
        await self._app(scope, receive, send)


def _needs_no_key(path: str) -> bool:
    return path in _WITHOUT_KEY or path.startswith(_STREAMS)


class BodyLimit:
    """Refuses a request whose body is too large, as soon as that is known. The rest is not read."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limit:
            raise self._too_large()
        size, started = 0, False

        async def receive_up_to_the_limit() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size <= self._limit:
                return message
            if started:  # too late for another status
                return {"type": "http.disconnect"}
            raise self._too_large()

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        return await self._app(scope, receive_up_to_the_limit, watch)

    def _too_large(self) -> Problem:
        return Problem(
            413,
            "Request entity too large",
            f"The body of a request may have at most {self._limit} bytes.",
            code="request_too_large",
            headers={"Connection": "close"},  # otherwise the server would read the rest of the body
        )
