"""What a request meets before the routes, over real HTTP: paths, ids, keys, hosts, origins and sizes."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI, Request
from server_clients import until
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from benchmarks.web_thread import WebThread
from llama.gateway.access.auth import Keys
from llama.gateway.access.sessions import Sessions
from llama.gateway.http.base_url import base_url_of
from llama.gateway.http.middleware import plain_path, wrap
from llama.gateway.http.problem_response import problem_response
from llama.gateway.problems import Problem, not_found, throttled
from llama.gateway.settings import GatewaySettings
from llama.gateway.storage.keys import hash_of
from llama.gateway.storage.storage import Storage
from llama.gateway.storage.store import Store

LIMIT = 1000


class Gateway:
    """Settings and keys without a queue, and routes that tell what they were given."""

    def __init__(self, database: Path, settings: dict[str, Any], *, loopback: bool) -> None:
        self.settings = GatewaySettings(database=database, max_body=LIMIT, **settings)
        key = self.settings.key
        self.storage = Storage(database)
        self.keys = Keys(
            self.storage, environment_key=key.get_secret_value() if key else None, loopback=loopback
        )
        self.sessions = Sessions("secret", self.keys)
        self.calls: list[str] = []

    def app(self) -> ASGIApp:
        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            await self.keys.load()
            yield
            self.storage.close()

        app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)

        @app.exception_handler(Problem)
        async def _(request: Request, problem: Problem) -> Response:
            return problem_response(problem, request.scope["path"])

        @app.api_route("/stream/{token}", methods=["GET"])
        async def stream(token: str) -> Response:
            return Response("data: x\n\n", headers={"access-control-allow-origin": "*"})

        @app.api_route("/broken", methods=["GET", "POST"])
        async def broken() -> Response:
            raise RuntimeError("the secret of the route")

        @app.api_route("/{path:path}", methods=["GET", "POST", "OPTIONS"])
        async def echo(request: Request) -> Response:
            self.calls.append(request.url.path)
            key = request.scope["state"].get("key")
            return JSONResponse(
                {
                    "path": request.url.path,
                    "query": request.url.query,
                    "raw_path": request.scope["raw_path"].decode(),
                    "key": key.name if key else None,
                    "size": len(await request.body()),
                    "base_url": base_url_of(request.scope, self.settings),
                }
            )

        return wrap(app, self)


class Running:
    def __init__(self, gateway: Gateway, web: WebThread) -> None:
        self.gateway, self.web = gateway, web
        self.client = httpx2.Client(base_url=web.url, trust_env=False, timeout=30)

    def get(self, path: str, **headers: str) -> httpx2.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.get(path, headers=named)

    def raw(self, text: str) -> bytes:
        """Send bytes as they are, and read until the connection is closed."""
        with socket.create_connection(("127.0.0.1", self.web.port), timeout=30) as connection:
            connection.sendall(text.encode("latin-1"))
            return b"".join(iter(lambda: connection.recv(65536), b""))


Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def start(*, loopback: bool = True, **settings: Any) -> Running:
            gateway = Gateway(tmp_path / "gateway.sqlite3", settings, loopback=loopback)
            web = stack.enter_context(WebThread(gateway.app(), lifespan=True))
            running = Running(gateway, web)
            stack.callback(running.client.close)
            return running

        yield start


@pytest.fixture
def keyed(start: Start) -> Running:
    """A gateway with a key, whose client sends it."""
    running = start(key="s3cret")
    running.client.headers["authorization"] = "Bearer s3cret"
    return running


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/predictions", "/predictions"),
        ("/v1/predictions", "/predictions"),
        ("/v1/v1/predictions", "/predictions"),
        ("/v1/v1/v1/predictions", "/v1/predictions"),
        ("/v1/predictions/", "/predictions"),
        ("/v1//predictions", "/predictions"),
        ("//v1/predictions", "/predictions"),
        ("/v1", "/v1"),
        ("/v1/", "/v1"),
        ("/v1/v1", "/v1"),
        ("/", "/"),
        ("", "/"),
        ("/v10/predictions", "/v10/predictions"),
        ("/models/v1/v1", "/models/v1/v1"),
    ],
)
def test_every_form_of_a_path_is_one_path(path: str, expected: str) -> None:
    assert plain_path(path) == expected


def test_routes_see_the_plain_decoded_path_and_the_query(keyed: Running) -> None:
    seen = keyed.get("/v1/models/meta%2Fllama-2-70b-chat/?cursor=a%2Fb").json()
    assert seen["path"] == "/models/meta/llama-2-70b-chat"
    assert seen["raw_path"] == "/models/meta/llama-2-70b-chat"
    assert seen["query"] == "cursor=a%2Fb"
    assert keyed.get("/v1/v1/predictions").json()["path"] == "/predictions"


@pytest.mark.parametrize("path", ["/predictions", "/v1/nothing", "/healthz", "/stream/x"])
def test_every_response_has_a_request_id(keyed: Running, path: str) -> None:
    one, other = (keyed.get(path).headers["x-request-id"] for _ in range(2))
    assert one.startswith("req_")
    assert one != other


def test_a_refusal_and_a_broken_route_have_a_request_id_as_well(keyed: Running) -> None:
    refused = keyed.get("/predictions", authorization="Bearer wrong")
    broken = keyed.get("/broken")
    assert (refused.status_code, broken.status_code) == (401, 500)
    assert refused.headers["x-request-id"] != broken.headers["x-request-id"]
    assert "secret of the route" not in broken.text


@pytest.mark.parametrize("given", ["abc-123", "req_1", "trace:1/2.3=+"])
def test_a_clients_request_id_is_kept(keyed: Running, given: str) -> None:
    assert keyed.get("/predictions", x_request_id=given).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "with space", "x" * 129, "<b>", "a;b", 'a"b'])
def test_a_strange_request_id_is_replaced(keyed: Running, given: str) -> None:
    assert keyed.get("/predictions", x_request_id=given).headers["x-request-id"].startswith("req_")


def test_a_request_with_a_key_has_the_key_in_its_state(keyed: Running) -> None:
    assert keyed.get("/predictions").json()["key"] == "environment"
    assert keyed.get("/predictions", authorization="Token s3cret").json()["key"] == "environment"


def test_a_wrong_key_reaches_no_route_and_no_body_is_read(start: Start) -> None:
    running = start(key="s3cret")
    big = b"x" * (LIMIT + 1)
    for path in (
        "/predictions",
        "/v1/unknown",
        "/models",
        "/chat/completions",
        "/v1",
        "/stream",
        "/healthz/x",
    ):
        assert running.get(path).status_code == 401, path
        response = running.client.post(path, headers={"authorization": "Bearer wrong"}, content=big)
        assert response.status_code == 401, path
    assert running.gateway.calls == []


@pytest.mark.parametrize("key", ["", "secret"])
def test_health_checks_do_not_wait_for_the_database(start: Start, key: str) -> None:
    running = start(**({"key": key} if key else {}))
    free = threading.Event()
    holder = threading.Thread(target=running.web.run, args=(held(running.gateway.storage, free),))
    holder.start()
    try:
        time.sleep(1.1)  # longer than the keys are taken as read
        for path in ("/healthz", "/readyz"):
            assert running.client.get(path, timeout=10).status_code == 200
    finally:
        free.set()
        holder.join()


async def held(storage: Storage, free: threading.Event) -> None:
    """Keep the database busy."""
    await storage.run(lambda _: free.wait(30))


def test_streams_and_health_checks_need_no_key(start: Start) -> None:
    running = start(key="s3cret")
    for path in ("/stream/token", "/v1/stream/token", "/healthz", "/readyz", "/v1/healthz/"):
        assert running.get(path).status_code == 200, path


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]
)
def test_openais_paths_are_refused_in_openais_shape(start: Start, path: str) -> None:
    response = start(key="s3cret").get(path)
    assert response.status_code == 401
    assert response.json() == {
        "error": {
            "message": "You did not pass an authentication token",
            "type": "authentication_error",
            "param": None,
            "code": "invalid_api_key",
        }
    }
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/predictions",
        "/predictions/x/cancel",
        "/v1/deployments/a/b/predictions",
        "/v1/models/meta/llama-2-70b-chat/predictions",
        "/v1/models/meta/llama-2-70b-chat/versions/x",
        "/v1/account",
    ],
)
def test_replicates_paths_are_refused_with_problem_json(start: Start, path: str) -> None:
    response = start(key="s3cret").get(path, authorization="Bearer wrong")
    assert response.json() == {
        "title": "Unauthenticated",
        "detail": "You did not pass a valid authentication token",
        "status": 401,
    }
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/meta/llama-2-70b-chat", "/v1/unknown", "/v1"])
def test_shared_and_unknown_paths_are_refused_in_both_shapes(start: Start, path: str) -> None:
    body = start(key="s3cret").get(path).json()
    assert body["error"]["code"] == "invalid_api_key"
    assert (body["title"], body["status"]) == ("Unauthenticated", 401)


def test_a_problem_keeps_its_headers_and_members() -> None:
    response = problem_response(throttled("Wait.", 9), "/predictions")
    assert response.status_code == 429
    assert response.headers["retry-after"] == "9"
    assert json.loads(bytes(response.body))["retry_after"] == 9
    assert json.loads(bytes(problem_response(not_found(), "/models/a").body))["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]", "[::1]:8000", "LOCALHOST"]
)
def test_an_open_gateway_answers_for_loopback_names(start: Start, host: str) -> None:
    response = start().get("/predictions", host=host)
    assert (response.status_code, response.json()["key"]) == (200, "local")


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "127.0.0.2", "a@localhost"],
)
@pytest.mark.parametrize("path", ["/predictions", "/v1/chat/completions", "/stream/x"])
def test_an_open_gateway_refuses_other_host_names(start: Start, host: str, path: str) -> None:
    running = start()
    response = running.get(path, host=host)
    assert response.status_code == 403
    assert "localhost" in response.text
    assert running.gateway.calls == []


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8000", 200),
        ("HTTP://LOCALHOST:8000", 200),
        ("http://localhost:3000", 403),
        ("http://localhost", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("https://page.example", 200),
        ("https://page.example:444", 403),
    ],
)
def test_an_open_gateway_answers_only_its_own_pages_and_allowed_ones(
    start: Start, origin: str, status: int
) -> None:
    running = start(allowed_origins="https://page.example")
    response = running.client.post("/predictions", headers={"host": "localhost:8000", "origin": origin})
    assert response.status_code == status


def test_a_stream_of_an_open_gateway_can_be_read_by_any_page(start: Start) -> None:
    response = start().get("/stream/token", origin="https://any.example")
    assert response.status_code == 200
    assert response.headers.get_list("access-control-allow-origin") == ["*"]


def test_hosts_and_origins_are_free_once_a_key_is_needed(keyed: Running) -> None:
    response = keyed.get("/predictions", host="gateway.example", origin="https://any.example")
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


def test_a_key_that_is_added_closes_an_open_gateway(start: Start, tmp_path: Path) -> None:
    running = start()
    assert running.get("/predictions").json()["key"] == "local"
    store = Store(tmp_path / "gateway.sqlite3")
    store.keys.add("ann", hash_of("k1"))
    store.close()
    until(lambda: running.get("/predictions").status_code == 401)
    assert running.get("/predictions", authorization="Bearer k1").json()["key"] == "ann"


def preflight(running: Running, path: str, origin: str) -> httpx2.Response:
    return running.client.options(
        path,
        headers={
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization, content-type, prefer, x-stainless-os",
        },
    )


def test_a_preflight_from_an_allowed_origin_works_without_a_key(start: Start) -> None:
    running = start(key="s3cret", allowed_origins="https://page.example,https://other.example")
    response = preflight(running, "/v1/chat/completions", "https://page.example")
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://page.example"
    assert "POST" in response.headers["access-control-allow-methods"]
    for name in ("authorization", "prefer", "x-stainless-os"):
        assert name in response.headers["access-control-allow-headers"]
    assert response.headers["x-request-id"]
    assert running.gateway.calls == []


@pytest.mark.parametrize("allowed", ["", "https://page.example"])
def test_a_preflight_from_another_origin_fails(start: Start, allowed: str) -> None:
    running = start(key="s3cret", allowed_origins=allowed)
    response = preflight(running, "/v1/predictions", "https://evil.example")
    assert response.status_code >= 400
    assert "access-control-allow-origin" not in response.headers


def test_an_allowed_page_can_read_responses_problems_and_their_headers(start: Start) -> None:
    running = start(key="s3cret", allowed_origins="https://page.example")
    for path in ("/v1/predictions", "/stream/token"):
        response = running.get(path, origin="https://page.example")
        assert response.headers.get_list("access-control-allow-origin") in (["https://page.example"], ["*"])
        assert response.headers["access-control-expose-headers"] == "x-request-id, retry-after"
    other = running.get("/v1/predictions", origin="https://evil.example")
    assert "access-control-allow-origin" not in other.headers


def test_a_stream_can_be_read_by_any_page_after_a_preflight(start: Start) -> None:
    running = start(key="s3cret")
    response = running.client.options(
        "/v1/stream/token",
        headers={
            "origin": "https://any.example",
            "access-control-request-method": "GET",
            "access-control-request-headers": "last-event-id",
        },
    )
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, "*")


def test_a_body_of_the_maximum_size_is_accepted(keyed: Running) -> None:
    assert keyed.client.post("/predictions", content=b"x" * LIMIT).json()["size"] == LIMIT
    chunks = (b"x" * 100 for _ in range(LIMIT // 100))
    assert keyed.client.post("/predictions", content=chunks).json()["size"] == LIMIT


@pytest.mark.parametrize("chunked", [False, True])
def test_a_larger_body_is_refused_in_the_shape_of_the_api(keyed: Running, chunked: bool) -> None:
    def body() -> Any:
        return (b"x" * 100 for _ in range(20)) if chunked else b"x" * 2000

    response = keyed.client.post("/v1/predictions", content=body())
    assert (response.status_code, response.json()["status"]) == (413, 413)
    response = keyed.client.post("/v1/chat/completions", content=body())
    assert response.status_code == 413
    assert response.json()["error"]["message"] == "The body of a request may have at most 1000 bytes."
    assert response.headers["connection"] == "close"


def test_a_body_that_is_announced_as_too_large_is_refused_before_it_is_sent(keyed: Running) -> None:
    head = "POST /v1/predictions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s3cret\r\n"
    assert keyed.raw(f"{head}Content-Length: 1001\r\n\r\n").startswith(b"HTTP/1.1 413 ")
    # A client that waits for permission, as curl does, never sends it.
    waiting = keyed.raw(f"{head}Content-Length: 9999999\r\nExpect: 100-continue\r\n\r\n")
    assert waiting.startswith(b"HTTP/1.1 413 ")
    assert keyed.gateway.calls == []


def test_a_chunked_body_without_an_end_is_refused_at_the_limit(keyed: Running) -> None:
    head = "POST /v1/predictions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s3cret\r\n"
    chunk = "3e8\r\n" + "x" * 1000 + "\r\n"
    answer = keyed.raw(f"{head}Transfer-Encoding: chunked\r\n\r\n{chunk}{chunk}")
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_an_error_of_a_layer_is_a_problem_without_its_text(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    running = start(key="s3cret")
    running.gateway.storage.close()  # so that the keys can no longer be read
    with caplog.at_level(logging.ERROR):
        while (response := running.get("/v1/chat/completions")).status_code == 401:
            pass  # until the keys that were read are a second old
        until(lambda: "Exception in ASGI application" in caplog.text)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "shutdown" not in response.text


def test_the_base_url_is_the_address_that_the_client_used(keyed: Running) -> None:
    assert keyed.get("/x", host="gw.example:8443").json()["base_url"] == "http://gw.example:8443"
    forwarded = {"x_forwarded_proto": "https", "x_forwarded_host": "evil.example", "x_forwarded_port": "1"}
    assert keyed.get("/x", host="gw.example", **forwarded).json()["base_url"] == "http://gw.example"


def test_a_trusted_proxy_names_the_base_url(start: Start) -> None:
    running = start(key="s3cret", trusted_proxies="10.0.0.0/8,127.0.0.1")

    def base_url(**headers: str) -> str:
        response = running.get("/x", host="inner:80", authorization="Bearer s3cret", **headers)
        return str(response.json()["base_url"])

    assert base_url() == "http://inner:80"
    assert base_url(x_forwarded_proto="https", x_forwarded_host="gw.example") == "https://gw.example"
    ports = {"x_forwarded_proto": "https", "x_forwarded_host": "gw.example"}
    assert base_url(**ports, x_forwarded_port="443") == "https://gw.example"
    assert base_url(**ports, x_forwarded_port="8443") == "https://gw.example:8443"
    assert base_url(**ports, x_forwarded_port="x") == "https://gw.example"
    assert base_url(x_forwarded_host="evil.example, gw.example") == "http://gw.example"
    assert base_url(x_forwarded_host="[::1]", x_forwarded_port="81") == "http://[::1]:81"


def test_the_public_url_is_used_whatever_a_request_says(start: Start) -> None:
    running = start(key="s3cret", public_url="https://llama.example/base/")
    response = running.get("/x", host="other.example", authorization="Bearer s3cret")
    assert response.json()["base_url"] == "https://llama.example/base"


@pytest.mark.parametrize("host", ["a b", "a/b", "a?b", 'a"b', "a@b", "a:b", "", "[::1", "<x>", "a:123456"])
def test_a_host_with_odd_characters_is_a_bad_request(keyed: Running, host: str) -> None:
    request = f"GET /v1/predictions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer s3cret\r\nConnection: close\r\n\r\n"
    answer = keyed.raw(request)
    if host:
        assert answer.startswith(b"HTTP/1.1 400 ")
    else:
        assert f'"base_url":"http://127.0.0.1:{keyed.web.port}"'.encode() in answer
