"""Shared by the end-to-end tests: clients of a running server, and a receiver of its webhooks.

All requests are real HTTP on loopback. Knows predictions and events; knows nothing about models.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import DEVNULL
from types import TracebackType
from typing import Any, Self, cast

import httpx2

from llama.serving.server import CogServer

Body = dict[str, Any]

PATIENCE = 60.0  # seconds to wait for something that should happen soon, even on a busy machine


def until(condition: Callable[[], object], timeout: float = PATIENCE) -> None:
    """Wait until `condition()` is true. Fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"the condition was not met within {timeout:.0f} s"
        time.sleep(0.01)


def post(server: CogServer, inputs: Mapping[str, Any], **request: Any) -> httpx2.Response:
    """A plain prediction. `request`: other members of its body, such as `id`."""
    deadline = time.monotonic() + PATIENCE
    while True:
        response = server.client.post("/predictions", json={"input": inputs, **request}, timeout=PATIENCE)
        # In a burst of requests, Cog may answer 409 although slots are free.
        if response.status_code != 409 or time.monotonic() > deadline:
            return response
        time.sleep(0.05)


def answer(server: CogServer, inputs: Mapping[str, Any]) -> Body:
    """The body of the response to a plain prediction, whether it succeeded or failed."""
    response = post(server, inputs)
    assert response.status_code == 200, response.text
    body = response.json()
    assert isinstance(body, dict)
    return body


def text(server: CogServer, inputs: Mapping[str, Any]) -> str:
    """The joined answer of a plain prediction that succeeds."""
    body = answer(server, inputs)
    assert body["status"] == "succeeded", body
    return "".join(body.get("output", []))


def events(
    server: CogServer, inputs: Mapping[str, Any], **request: Any
) -> Generator[tuple[str, Body], None, None]:
    """The events of a stream. Closing the iterator early drops the connection."""
    arguments: dict[str, Any] = {
        "json": {"input": inputs, **request},
        "timeout": PATIENCE,
        "max_event_size": None,
    }
    deadline = time.monotonic() + PATIENCE
    while True:
        with server.client.sse("/predictions", method="POST", **arguments) as source:
            if source.response.status_code == 200:
                for event in source:
                    yield event.event, cast("Body", event.json())
                return
            source.response.read()
            assert source.response.status_code == 409, source.response.text
        assert time.monotonic() < deadline, "no slot became free"
        time.sleep(0.05)


def drop_after_output(stream: Generator[tuple[str, Body], None, None], outputs: int) -> None:
    """Read `outputs` pieces of a stream, then drop its connection."""
    with closing(stream):
        for _ in range(outputs):
            assert any(name == "output" for name, _ in stream)


class BackgroundStream:
    """A stream that is read to the end in a separate thread."""

    def __init__(self, server: CogServer, inputs: Mapping[str, Any], **request: Any) -> None:
        self.events = list[tuple[float, str, Body]]()
        """The time of arrival, the name and the data of each event."""
        self._thread = threading.Thread(
            target=self._read, args=(events(server, inputs, **request),), daemon=True
        )
        self._thread.start()

    def _read(self, stream: Iterator[tuple[str, Body]]) -> None:
        for name, data in stream:
            self.events.append((time.monotonic(), name, data))

    @property
    def running(self) -> bool:
        """Whether a piece of the answer has arrived and the stream has not ended."""
        names = {name for _, name, _ in self.events}
        return "output" in names and "completed" not in names

    def wait_for(self, name: str) -> Self:
        """Wait until an event with this name has arrived."""
        until(lambda: any(seen == name for _, seen, _ in self.events))
        return self

    def result(self) -> Body:
        """Wait for the end, and return the data of the last event, which must be `completed`."""
        self._thread.join(2 * PATIENCE)
        assert not self._thread.is_alive(), "the stream did not end"
        assert self.events, "the stream had no events"
        _, name, data = self.events[-1]
        assert name == "completed", f"the stream ended without `completed` after {len(self.events)} events"
        return data

    @property
    def arrivals(self) -> list[float]:
        return [at for at, name, _ in self.events if name == "output"]


class WebhookReceiver:
    """A context manager that runs a web server on loopback and keeps the bodies of all requests."""

    def __enter__(self) -> Self:
        self._bodies = bodies = list[Body]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                bodies.append(json.loads(self.rfile.read(length)))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128  # every piece sends a webhook, and none may be refused

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def request(self, prediction_id: str) -> Body:
        """Members of a request body that send the prediction's output and completion to this server."""
        return {
            "id": prediction_id,
            "webhook": self.url,
            "webhook_events_filter": ["output", "completed"],
        }

    def _of(self, prediction_id: str) -> list[Body]:
        return [body for body in list(self._bodies) if body["id"] == prediction_id]

    def wait_for_output(self, prediction_id: str) -> None:
        until(lambda: any(body.get("output") for body in self._of(prediction_id)))

    def wait_for_end(self, prediction_id: str) -> Body:
        """Wait for the webhook of a finished prediction. Webhooks may arrive out of order."""
        ended = list[Body]()

        def has_ended() -> bool:
            ended.extend(b for b in self._of(prediction_id) if b["status"] not in ("starting", "processing"))
            return bool(ended)

        until(has_ended)
        return ended[0]


SYSTEM_PROMPT = "You are a helpful, respectful and honest assistant."
# vLLM allocates its cache in blocks, so a request waits only if all blocks are in use.
BY_BLOCKS = os.environ.get("LLAMA_ENGINE") == "vllm"
BYTES_PER_TOKEN = 2 * 2 * 2 * 32 * 4  # keys and values, layers, KV heads, head size, float32


def tiny_server(folder: Path, *, output: Any = DEVNULL, **environment: str) -> CogServer:
    """A server with the model in `folder`, on one CPU thread: more threads slow down such a small model."""
    variables = {"LLAMA_WEIGHTS": str(folder), "OMP_NUM_THREADS": "1", **environment}
    return CogServer(variables, output=output)


def exactly(tokens: int, **inputs: Any) -> dict[str, Any]:
    """Greedy inputs whose answer has exactly this many tokens."""
    return {"temperature": 0, "max_new_tokens": tokens, "min_new_tokens": tokens, **inputs}


def start(server: CogServer, inputs: dict[str, Any], request: dict[str, Any]) -> None:
    """Start a prediction and return without waiting for its answer."""
    response = server.client.put(
        f"/predictions/{request['id']}",
        json={"input": inputs, **request},
        headers={"Prefer": "respond-async"},
        timeout=PATIENCE,
    )
    assert response.status_code == 202, response.text


def cancel(server: CogServer, prediction_id: str) -> None:
    response = server.client.post(f"/predictions/{prediction_id}/cancel", timeout=PATIENCE)
    assert response.status_code == 200, response.text


def in_parallel(function: Any, arguments: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(function, arguments))
