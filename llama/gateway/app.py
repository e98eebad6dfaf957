"""The ASGI application: the routes of both APIs and of the probes, behind the middleware."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from llama.gateway.gateway import Gateway
from llama.gateway.http.disconnect import ClientLeft
from llama.gateway.http.middleware import wrap
from llama.gateway.http.problem_response import problem_response
from llama.gateway.problems import Problem, not_found
from llama.gateway.routes import catalog, openai, replicate, stream


def create_app(gateway: Gateway) -> ASGIApp:
    """Build the application of a gateway, which starts and ends with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with gateway.running():
            yield

    # The bodies are not declared, so a generated description would say nothing about them.
    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.state.gateway = gateway
    app.add_api_route("/healthz", _healthz)
    app.add_api_route("/readyz", _readyz)
    for routes in (replicate, stream, openai, catalog):
        app.include_router(routes.router)
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(HTTPException, _http_exception)
    for left in (ClientDisconnect, ClientLeft):
        app.add_exception_handler(left, _client_left)
    app.add_exception_handler(Exception, _unexpected)
    return wrap(app, gateway)


async def _healthz() -> dict[str, str]:
    return {"status": "alive"}


async def _readyz(request: Request) -> Response:
    servers = request.app.state.gateway.servers
    ready = sum(server.ready for server in servers.all)
    body = {"status": "ready" if ready else "not ready", "servers": len(servers.all), "ready": ready}
    return JSONResponse(body, 200 if ready else 503)


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return problem_response(error, request.scope["path"])


async def _http_exception(request: Request, error: Exception) -> Response:
    """What the router itself refuses: an unknown path or method."""
    assert isinstance(error, HTTPException)
    problem = (
        not_found()
        if error.status_code == 404
        else Problem(
            error.status_code,
            str(error.detail),
            f"{error.detail}: {request.method} {request.scope['path']}",
            code="method_not_allowed" if error.status_code == 405 else None,
        )
    )
    problem.headers.update(error.headers or {})
    return problem_response(problem, request.scope["path"])


async def _client_left(_: Request, __: Exception) -> Response:
    """The client closed its connection, so nobody reads this response. nginx logs the same status."""
    return Response(status_code=499)


async def _unexpected(request: Request, _: Exception) -> Response:
    """An error of the gateway itself, which uvicorn logs."""
    problem = Problem(
        500, "Internal server error", "The gateway failed; its log says why.", code="internal_error"
    )
    return problem_response(problem, request.scope["path"])
