"""The gateway's own server: what it takes from clients that send or read too slowly, and how it ends."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from gateways import KEY, MODEL, port_of
from server_clients import PATIENCE, until
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from benchmarks.fake_cog import FakeCog, Script
from llama.gateway.dispatch.addresses import Addresses
from llama.gateway.gateway import Gateway
from llama.gateway.http.protocol import LimitedProtocol, Limits
from llama.gateway.settings import GatewaySettings
from llama.gateway.start import GatewayServer

LINE = "GET /healthz HTTP/1.1\r\nHost: x\r\n"
AUTHORIZED = f"Host: x\r\nAuthorization: Bearer {KEY}\r\n"


class Running:
    """A gateway in a thread, as the command runs it."""

    def __init__(self, servers: list[str], database: Path, *, grace: int, limits: Limits) -> None:
        self._arguments = servers, database, grace, limits
        self._started = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.thread.start()
        assert self._started.wait(PATIENCE)
        self.port = port_of(self.server)
        self.url = f"http://127.0.0.1:{self.port}"
        headers = {"Authorization": f"Bearer {KEY}"}
        self.client = httpx2.Client(base_url=self.url, headers=headers, timeout=PATIENCE, trust_env=False)

    async def _serve(self) -> None:
        servers, database, grace, limits = self._arguments
        settings = GatewaySettings.model_validate({"key": KEY, "database": database})
        self.gateway = Gateway(settings, Addresses(servers), grace=grace, ping_interval=0.05)
        self.server = GatewayServer(
            self.gateway, "127.0.0.1", 0, self._started.set, grace=grace, limits=limits
        )
        await self.server.serve()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    def end(self) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


Start = Callable[..., Running]


@pytest.fixture
def start(cog: FakeCog, tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def start(grace: int = 1, **limits: Any) -> Running:
            running = Running([cog.url], tmp_path / "gateway.sqlite3", grace=grace, limits=Limits(**limits))
            stack.callback(running.end)
            stack.callback(running.client.close)
            until(lambda: running.client.get("/readyz").status_code == 200)
            running.client.close()
            running.client = httpx2.Client(
                base_url=running.url, headers=running.client.headers, timeout=PATIENCE, trust_env=False
            )
            until(lambda: running.connections == 0)
            return running

        yield start


def received(connection: socket.socket) -> bytes:
    """What arrives until the connection is closed."""
    found = b""
    try:
        while data := connection.recv(65536):
            found += data
    except ConnectionResetError:
        pass
    return found


def send(connection: socket.socket, data: bytes, times: int = 1) -> None:
    """Send data; the server may close the connection meanwhile."""
    try:
        for _ in range(times):
            connection.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        pass


# --- what a client may send


@pytest.mark.parametrize(
    "head",
    [
        "GET /" + "x" * 70_000 + " HTTP/1.1\r\nHost: x\r\n\r\n",
        LINE + "A: " + "x" * 70_000 + "\r\n\r\n",
        LINE + "A: 1\r\n" * 40_000 + "\r\n",
        LINE + "x" * 70_000 + ": 1\r\n\r\n",
    ],
    ids=["url", "value", "count", "name"],
)
def test_a_large_head_is_refused(start: Start, head: str) -> None:
    running = start()
    with running.connect() as connection:
        send(connection, head.encode())
        assert received(connection).startswith(b"HTTP/1.1 431 ")
    until(lambda: running.connections == 0)


@pytest.mark.parametrize(
    "beginning",
    [
        LINE + "A: ",
        LINE,
        "GET /",
        "POST /v1/predictions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + AUTHORIZED + "\r\n0\r\nA: ",
    ],
    ids=["value", "name", "url", "trailer"],
)
def test_a_head_without_an_end_is_not_kept(start: Start, beginning: str) -> None:
    running = start()
    with running.connect() as connection:
        send(connection, beginning.encode())
        send(connection, b"x" * 65536, times=1000)
        received(connection)
    until(lambda: running.connections == 0)


def test_heads_and_bodies_within_the_limits_are_read(start: Start) -> None:
    running = start()
    headers = {f"x-{number}": "v" * 1000 for number in range(50)}
    assert running.client.get("/v1/models", headers=headers).status_code == 200
    body = b'{"input": {"prompt": "' + b"x" * 500_000 + b'"}}'
    pieces = (body[index : index + 50] for index in range(0, len(body), 50))
    for content in (body, pieces):
        created = running.client.post(f"/v1/models/{MODEL}/predictions", content=content, headers=headers)
        assert created.status_code == 201, created.text


@pytest.mark.parametrize(
    "sent",
    [
        "",
        "\r\n",
        "GET",
        LINE,
        f"POST /v1/predictions HTTP/1.1\r\nContent-Length: 100\r\n{AUTHORIZED}\r\n{{",
        "POST /v1/predictions HTTP/1.1\r\nContent-Length: 100\r\nHost: x\r\n\r\n{",
        f"{LINE}\r\n{LINE}",
    ],
    ids=["nothing", "line", "method", "head", "body", "refused body", "second head"],
)
def test_a_request_that_does_not_come_whole_is_dropped(start: Start, sent: str) -> None:
    running = start(request=0.3)
    with running.connect() as connection:
        send(connection, sent.encode())
        received(connection)  # until it is closed
    until(lambda: running.connections == 0)


def test_a_connection_on_which_only_a_blank_line_follows_a_response_is_dropped(start: Start) -> None:
    running = start(request=0.3)
    with running.connect() as connection:
        send(connection, f"{LINE}\r\n".encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        send(connection, b"\r\n")
        received(connection)
    until(lambda: running.connections == 0)


def test_a_client_that_only_waits_for_its_response_is_kept(start: Start, cog: FakeCog) -> None:
    running = start(request=0.2)
    cog.rules.script = Script(["a", "b"], gap=0.5)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
    with running.client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        assert "[DONE]" in response.read().decode()
    assert running.client.post("/v1/chat/completions", json=body).status_code == 200


def test_a_request_behind_a_running_response_may_be_late(start: Start, cog: FakeCog) -> None:
    running = start(request=0.2)
    cog.rules.script = Script(["a", "b"], gap=0.5)
    created = running.client.post(f"/v1/models/{MODEL}/predictions", json={"input": {"prompt": "Hi"}}).json()
    path = created["urls"]["stream"].removeprefix(running.url)
    with running.connect() as connection:
        send(connection, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\nGET /".encode())
        assert b"event: done" in received(connection)  # and then the second request is dropped


def test_uvicorn_calls_what_the_limits_are_built_on() -> None:
    own = {name for name, value in vars(LimitedProtocol).items() if callable(value) and name[0] != "_"}
    assert own == {
        "connection_lost",
        "connection_made",
        "data_received",
        "on_body",
        "on_header",
        "on_message_begin",
        "on_message_complete",
        "on_response_complete",
        "on_url",
        "pause_writing",
        "resume_writing",
        "send_400_response",
    }
    assert own <= vars(HttpToolsProtocol).keys()


# --- requests to change the protocol

UPGRADES = {
    "h2c": "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
    "websocket": "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
}
CREATE = f"POST /v1/models/{MODEL}/predictions HTTP/1.1\r\n{AUTHORIZED}"
INPUT = '{"input": {"prompt": "Hi"}}'
BODIES = {
    "whole": f"Content-Length: {len(INPUT)}\r\n\r\n{INPUT}",
    "chunked": f"Transfer-Encoding: chunked\r\n\r\n{len(INPUT):x}\r\n{INPUT}\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("piece", [1, 10_000])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
def test_a_request_to_change_the_protocol_is_answered_in_http_1_and_its_body_is_read(
    start: Start, cog: FakeCog, capsys: pytest.CaptureFixture[str], upgrade: str, body: str, piece: int
) -> None:
    running = start()
    sent = (CREATE + upgrade + body + LINE + "Connection: close\r\n\r\n").encode()
    with running.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for index in range(0, len(sent), piece):
            send(connection, sent[index : index + piece])
        answers = received(connection)
    assert answers.startswith(b"HTTP/1.1 201 ")
    assert answers.count(b"HTTP/1.1 200 ") == 1
    until(lambda: [served.inputs["prompt"] for served in cog.served] == ["Hi"])
    assert capsys.readouterr().err == ""


def test_all_of_many_requests_to_change_the_protocol_are_answered(start: Start) -> None:
    running = start()
    request = LINE + "Connection: upgrade\r\nUpgrade: h2c\r\n"
    with running.connect() as connection:
        send(connection, f"{request}\r\n".encode())
        send(connection, (f"{request}\r\n" * 1500 + LINE + "Connection: close\r\n\r\n").encode())
        assert received(connection).count(b"HTTP/1.1 200 ") == 1502


def test_a_large_head_with_a_request_to_change_the_protocol_is_refused(start: Start) -> None:
    running = start()
    with running.connect() as connection:
        send(connection, (LINE + UPGRADES["h2c"] + "A: 1\r\n" * 40_000 + "\r\n").encode())
        assert received(connection).startswith(b"HTTP/1.1 431 ")


def test_a_request_for_a_tunnel_is_refused(start: Start) -> None:
    running = start()
    with running.connect() as connection:
        send(connection, b"CONNECT 127.0.0.1:80 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert received(connection).startswith(b"HTTP/1.1 400 ")


def test_curl_that_asks_for_http_2_gets_its_answer(start: Start) -> None:
    curl = shutil.which("curl")
    if curl is None or "HTTP2" not in subprocess.check_output([curl, "-V"], text=True):
        pytest.skip("curl with HTTP/2 is not installed")
    running = start()
    command = [curl, "-sS", "--noproxy", "*", "--http2", "-w", "%{http_code}", "-o", os.devnull]
    command += ["-H", f"Authorization: Bearer {KEY}", "-d", INPUT]
    done = subprocess.run(
        [*command, f"{running.url}/v1/models/{MODEL}/predictions"],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.stdout, done.stderr) == ("201", "")


# --- what a client may leave unread


@contextmanager
def unread(running: Running, request: str) -> Iterator[None]:
    """A client that sends a request and never reads."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", running.port))
        connection.sendall(request.encode())
        yield


def long_answer(cog: FakeCog) -> None:
    cog.rules.script = Script(["x" * 100_000] * 300 + ["end"], gap=0.001)


def test_a_completion_that_is_not_read_is_cancelled(start: Start, cog: FakeCog) -> None:
    running = start(reading=0.3)
    cog.rules.script = Script(["x" * 100_000] * 300, hold_after=300)
    body = f'{{"model": "{MODEL}", "stream": true, "messages": [{{"role": "user", "content": "Hi"}}]}}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\n{AUTHORIZED}Content-Length: {len(body)}\r\n\r\n"
    with unread(running, head + body):
        until(lambda: running.connections == 1)
        until(lambda: running.connections == 0)

    until(lambda: [served.status for served in cog.served] == ["cancelled"])


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_a_stream_that_is_not_read_is_dropped_and_its_prediction_goes_on(
    start: Start, cog: FakeCog, connection: str
) -> None:
    running = start(reading=0.3)
    long_answer(cog)
    created = running.client.post(f"/v1/models/{MODEL}/predictions", json={"input": {"prompt": "Hi"}}).json()
    running.client.close()
    path = created["urls"]["stream"].removeprefix(running.url)
    with unread(running, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: {connection}\r\n\r\n"):
        until(lambda: running.connections == 1)
        until(lambda: running.connections == 0)
    until(lambda: [served.status for served in cog.served] == ["succeeded"])


def test_a_client_that_reads_slowly_is_kept(start: Start, cog: FakeCog) -> None:
    running = start(reading=2.0)
    long_answer(cog)
    created = running.client.post(f"/v1/models/{MODEL}/predictions", json={"input": {"prompt": "Hi"}}).json()
    path = created["urls"]["stream"].removeprefix(running.url)
    found = 0
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.connect(("127.0.0.1", running.port))
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        while data := connection.recv(1_000_000):
            found += len(data)
            time.sleep(0.01)
    assert found > 30_000_000


# --- the end


def test_the_end_takes_the_grace_period_once(start: Start, cog: FakeCog) -> None:
    running = start(grace=2)
    cog.rules.script = Script(["a", "b"], hold_after=1)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    with running.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        assert "a" in next(line for line in lines if "content" in line)
        began = time.monotonic()
        running.server.should_exit = True
        running.thread.join(PATIENCE)
        assert 1 < time.monotonic() - began < 4


def test_a_running_answer_ends_before_the_gateway_does(start: Start, cog: FakeCog) -> None:
    running = start(grace=20)
    cog.rules.script = Script(["a", "b"], hold_after=1)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    with running.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        assert "a" in next(line for line in lines if "content" in line)
        running.server.should_exit = True
        until(lambda: not running.server.servers[0].is_serving())
        cog.release()
        assert "data: [DONE]" in list(lines)
    running.thread.join(PATIENCE)
    assert not running.thread.is_alive()


def test_clients_of_waiting_predictions_do_not_delay_the_end(start: Start, cog: FakeCog) -> None:
    running = start(grace=20)
    path, body = f"/v1/models/{MODEL}/predictions", {"input": {"prompt": "Hi"}}
    cog.rules.health = "STARTING"
    until(lambda: running.client.get("/readyz").status_code == 503)
    waiting = running.client.post(path, json=body).json()
    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(running.client.get, waiting["urls"]["stream"])
        wait = pool.submit(running.client.post, path, json=body, headers={"Prefer": "wait=30"})
        until(lambda: running.connections == 2 and len(running.gateway.predictions.unfinished()) == 2)
        began = time.monotonic()
        running.server.should_exit = True
        assert stream.result(PATIENCE).text.replace(": ping\n\n", "") == ""  # the stream ends without `done`
        assert (wait.result(PATIENCE).status_code, wait.result().json()["status"]) == (202, "starting")
        running.thread.join(PATIENCE)
    assert time.monotonic() - began < 5


def test_a_prediction_whose_request_arrives_during_the_end_does_not_delay_it(
    start: Start, cog: FakeCog
) -> None:
    running = start(grace=20)
    cog.rules.health = "STARTING"
    until(lambda: running.client.get("/readyz").status_code == 503)
    running.client.close()
    until(lambda: running.connections == 0)
    body = b'{"input": {"prompt": "Hi"}}'
    head = f"POST /v1/models/{MODEL}/predictions HTTP/1.1\r\n{AUTHORIZED}Prefer: wait=30\r\n"
    with running.connect() as connection:
        until(lambda: running.connections == 1)
        send(connection, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:5])
        (server_side,) = running.server.server_state.connections
        assert isinstance(server_side, LimitedProtocol)
        until(lambda: server_side.cycle)  # the head of the request was read
        began = time.monotonic()
        running.server.should_exit = True
        until(lambda: not running.server.servers[0].is_serving())
        send(connection, body[5:])
        assert received(connection).startswith(b"HTTP/1.1 202 ")
    running.thread.join(PATIENCE)
    assert time.monotonic() - began < 5
