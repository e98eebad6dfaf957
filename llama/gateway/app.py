"""The ASGI application: the routes of both APIs, the page and the probes, behind the middleware."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp

from llama.gateway.gateway import Gateway
from llama.gateway.http.disconnect import CLIENT_LEFT, ClientLeft
from llama.gateway.http.middleware import wrap
from llama.gateway.http.problem_response import problem_response
from llama.gateway.http.request_log import NoteRoute, RequestLog
from llama.gateway.page.files import page_files
from llama.gateway.page.renderer import MarkdownRenderer
from llama.gateway.problems import Problem, internal_error, not_found
from llama.gateway.routes import catalog, metrics, openai, page, replicate, stream

_ROUTERS = (replicate.router, stream.router, openai.router, catalog.router, page.router, metrics.router)


def create_app(gateway: Gateway) -> ASGIApp:
    """Build the application of a gateway, which starts and ends with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with gateway.running(), MarkdownRenderer() as app.state.markdown:
            yield

    # The bodies are not declared, so a generated description would say nothing about them.
    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.state.gateway, app.state.page = gateway, page_files()
    app.add_api_route("/healthz", _healthz)
    app.add_api_route("/readyz", _readyz)
    for route in _routes(app):
        if route.methods and "GET" in route.methods:
            route.methods.add("HEAD")  # the server leaves out the body
    for router in _ROUTERS:
        app.include_router(router)
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(HTTPException, _http_exception)
    for left in (ClientDisconnect, ClientLeft):
        app.add_exception_handler(left, _client_left)
    app.add_exception_handler(Exception, _unexpected)
    return RequestLog(wrap(NoteRoute(app), gateway), gateway.metrics)


def _routes(app: FastAPI) -> list[Route]:
    """All routes of the gateway. `app.routes` does not list those of the routers."""
    routes = [*app.routes, *(route for router in _ROUTERS for route in router.routes)]
    return [route for route in routes if isinstance(route, Route)]


async def _healthz() -> dict[str, str]:
    return {"status": "alive"}


async def _readyz(request: Request) -> Response:
    gateway: Gateway = request.app.state.gateway
    servers = gateway.servers.all
    ready = sum(server.ready for server in servers)
    if not gateway.storage.in_place:
        return JSONResponse(
            {"status": "not ready", "error": "the database was deleted; restart the gateway"}, 503
        )
    body = {"status": "ready" if ready else "not ready", "servers": len(servers), "ready": ready}
    return JSONResponse(body, 200 if ready else 503)


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return problem_response(error, request.scope["path"])


async def _http_exception(request: Request, error: Exception) -> Response:
    """What the router itself refuses: an unknown path or method."""
    assert isinstance(error, HTTPException)
    path, code = request.scope["path"], None
    if error.status_code == 404:
        return problem_response(not_found(), path)
    headers = dict(error.headers or {})
    if error.status_code == 405:  # the error names the methods of one route only
        code, headers["Allow"] = "method_not_allowed", ", ".join(sorted(_methods(request)))
    detail = f"{error.detail}: {request.method} /v1{path}"
    return problem_response(
        Problem(error.status_code, str(error.detail), detail, code=code, headers=headers), path
    )


def _methods(request: Request) -> set[str]:
    """The methods that a request's path has."""
    matching = (route for route in _routes(request.app) if route.matches(request.scope)[0] is not Match.NONE)
    return {method for route in matching for method in route.methods or ()}


async def _client_left(_: Request, __: Exception) -> Response:
    """The client closed its connection, so this response is not read."""
    return Response(status_code=CLIENT_LEFT)


async def _unexpected(request: Request, _: Exception) -> Response:
    """An error of the gateway itself, which uvicorn logs."""
    return problem_response(internal_error(), request.scope["path"])
