"""What happens to every request before a route is found: paths, request ids, CORS and limits.

Each class is one ASGI layer, and `wrap` puts them together with those of the modules beside this one.
"""

from __future__ import annotations

import re
import secrets
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.gateway.http.authentication import STREAMS, Authentication, Gateway
from llama.gateway.http.loopback_guard import LoopbackGuard
from llama.gateway.http.page_headers import PageHeaders
from llama.gateway.http.problem_response import problem_response
from llama.gateway.problems import Problem, internal_error

_EXPOSED_HEADERS = ("x-request-id", "retry-after")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def wrap(app: ASGIApp, gateway: Gateway) -> ASGIApp:
    """Put all layers around the app. The gateway's keys must be loaded when the first request comes."""
    settings = gateway.settings
    app = BodyLimit(app, settings.max_body)
    app = Authentication(app, gateway)
    app = LoopbackGuard(app, gateway)
    app = ProblemResponses(app)
    app = Cors(app, settings.allowed_origins)  # outside, so that a page can read the problems
    app = PageHeaders(app)
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
        if parts[:1] == ["v1"] and len(parts) > 1:  # `/v1` alone is not the page
            del parts[0]
    return "/" + "/".join(parts)


class Cors:
    """Lets web pages of the allowed origins use the API, and every web page read a stream, whose URL is a
    secret. Preflight requests are handled here, because they never have a key."""

    def __init__(self, app: ASGIApp, allowed_origins: tuple[str, ...]) -> None:
        self._streams = _cors(app, ("*",))
        self._others = _cors(app, allowed_origins) if allowed_origins else app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        of_stream = scope["type"] == "http" and scope["path"].startswith(STREAMS)
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
