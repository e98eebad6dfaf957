"""How a client reads the server-sent events of a stream."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llama.serving.server import CogServer

CHUNK = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\U0001f999"
"""Characters that Python's `splitlines` and some HTTP clients take for line ends."""
LONG = "x" * 2_000_000


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for name, data in (("output", {"chunk": CHUNK}), ("completed", {"output": LONG})):
            text = json.dumps(data, ensure_ascii=False)
            # JSON escapes control characters, but not the separators above U+007F.
            body = f"event: {name}\ndata: {text}\n\n".encode()
            for begin in range(100):  # byte by byte, to split characters as well
                self.wfile.write(body[begin : begin + 1])
                self.wfile.flush()
            self.wfile.write(body[100:])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http.server_port
        http.shutdown()


def test_a_stream_keeps_separators_split_characters_and_long_events(port: int) -> None:
    events = list(CogServer(port=port).stream({"prompt": "x"}))
    assert events == [("output", {"chunk": CHUNK}), ("completed", {"output": LONG})]
