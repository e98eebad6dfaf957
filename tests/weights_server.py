"""An HTTP server on loopback that serves files, and can interrupt, delay, redirect, damage or refuse them.

A step is a function that answers one request. Each step is used once, in order; after the last one, files are
served without faults.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Step = Callable[["Handler", bytes], None]


class Server:
    """`files` are the contents by path. `steps` answer downloads of a path; `first` answers any request for it,
    including the one for the first byte that a pull begins with."""

    def __init__(self, host: str = "127.0.0.1", handler: type[Handler] | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.steps: defaultdict[str, list[Step]] = defaultdict(list)
        self.first: defaultdict[str, list[Step]] = defaultdict(list)
        self.requests: list[tuple[str, dict[str, str]]] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler or Handler)
        self._http.daemon_threads = True
        self._http.server = self  # type: ignore[attr-defined]
        self.url = f"http://{host}:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def downloads(self, path: str) -> list[str]:
        """The ranges of all requests for more than the first byte; "" is a request for the complete file."""
        return [h.get("range", "") for p, h in self.requests if p == path and h.get("range") != "bytes=0-0"]

    def tokens(self) -> set[str | None]:
        return {headers.get("authorization") for _, headers in self.requests}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        server: Server = self.server.server
        path = self.path.partition("?")[0]
        headers = {name.lower(): value for name, value in self.headers.items()}
        server.requests.append((path, headers))
        body = server.files.get(path)
        queues = [server.first[path]]
        if headers.get("range") != "bytes=0-0":
            queues.append(server.steps[path])
        for queue in queues:
            if queue:
                return queue.pop(0)(self, body or b"")
        return serve(self, body) if body is not None else status(404)(self, b"")

    def answer(self, code: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def etag(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


def head_of(handler: Handler, body: bytes) -> tuple[int, dict[str, str], int]:
    """Return the status, the headers and the offset of the body, with support for Range and If-Range."""
    headers = {"ETag": etag(body), "Accept-Ranges": "bytes"}
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
    if match is None or handler.headers.get("If-Range", etag(body)) != etag(body):
        return 200, {**headers, "Content-Length": str(len(body))}, 0
    start, last = int(match[1]), min(int(match[2] or len(body)), len(body) - 1)
    if start >= len(body):
        return 416, {**headers, "Content-Length": "0", "Content-Range": f"bytes */{len(body)}"}, len(body)
    headers |= {"Content-Length": str(last + 1 - start), "Content-Range": f"bytes {start}-{last}/{len(body)}"}
    return 206, headers, start


def serve(handler: Handler, body: bytes) -> None:
    code, headers, start = head_of(handler, body)
    handler.answer(code, headers, body[start : start + int(headers["Content-Length"])])


def status(code: int, **headers: str) -> Step:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _: handler.answer(code, {"Content-Length": "0", **named}, b"")


def cut_after(sent: int, then: Callable[[], object] = lambda: None) -> Step:
    """Send `sent` bytes of a longer response and close the connection."""

    def step(handler: Handler, body: bytes) -> None:
        code, headers, start = head_of(handler, body)
        handler.answer(code, headers, body[start : start + sent])
        handler.wfile.flush()
        handler.close_connection = True
        then()

    return step


def stall_after(sent: int, until: threading.Event) -> Step:
    return cut_after(sent, lambda: until.wait(10))


def slowly(pieces: int, each: float) -> Step:
    def step(handler: Handler, body: bytes) -> None:
        code, headers, start = head_of(handler, body)
        handler.answer(code, headers, b"")
        size = -(-len(body) // pieces)
        for begin in range(start, len(body), size):
            handler.wfile.write(body[begin : begin + size])
            threading.Event().wait(each)

    return step


def without_ranges(handler: Handler, body: bytes) -> None:
    handler.answer(200, {"Content-Length": str(len(body))}, body)


def without_length(handler: Handler, body: bytes) -> None:
    chunk = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    handler.answer(200, {"Transfer-Encoding": "chunked"}, chunk)


def other_bytes(handler: Handler, body: bytes) -> None:
    """Zeros in place of the file, with the right length."""
    code, headers, start = head_of(handler, body)
    handler.answer(code, headers, bytes(len(body) - start))


def other_range(handler: Handler, body: bytes) -> None:
    half = len(body) // 2
    content_range = f"bytes {half}-{len(body) - 1}/{len(body)}"
    headers = {"Content-Length": str(len(body) - half), "Content-Range": content_range}
    handler.answer(206, headers, body[half:])


def redirect(location: str, **headers: str) -> Step:
    return status(302, Location=location, **headers)
