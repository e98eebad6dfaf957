"""httptools' parser for servers that speak HTTP/1.1 only.

A server may ignore an Upgrade header (RFC 9110, 7.8). httptools does not: it leaves the rest of the
connection to the other protocol, so the request's body and all later requests would be lost. Knows nothing
about limits.
"""

from __future__ import annotations

from typing import Any

import httptools


class RequestParser:
    """What uvicorn uses of httptools' parser. It reads a request that has an Upgrade header a second time,
    without that header."""

    def __init__(self, protocol: Any) -> None:
        """`protocol` collects the request in `url` and `headers`, as uvicorn's does."""
        self._protocol = protocol
        self.on_message_begin = protocol.on_message_begin
        self.on_url = protocol.on_url
        self.on_header = protocol.on_header
        self.on_body = protocol.on_body
        self._start()

    def _start(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        # As uvicorn does: a request behind one with "Connection: close" is ignored, not an error.
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def feed_data(self, data: bytes) -> None:
        """Raises HttpParserError."""
        rest = memoryview(data)
        while True:
            try:
                self._parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                rest = rest[upgrade.args[0] :]
            head = self._head_without_upgrade()
            self._start()
            self._parser.feed_data(head)

    def _head_without_upgrade(self) -> bytes:
        method, version = self._parser.get_method(), self._parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (method, self._protocol.url, version)]
        lines += [b"%b: %b" % header for header in self._protocol.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def on_headers_complete(self) -> None:
        if self._parser.get_method() == b"CONNECT":
            raise ValueError("the gateway is not a proxy")
        if not self._parser.should_upgrade():
            self._protocol.on_headers_complete()

    def on_message_complete(self) -> None:
        if not self._parser.should_upgrade():
            self._protocol.on_message_complete()

    def should_upgrade(self) -> bool:
        return False

    def should_keep_alive(self) -> bool:
        return bool(self._parser.should_keep_alive())

    def get_http_version(self) -> str:
        return str(self._parser.get_http_version())

    def get_method(self) -> bytes:
        return bytes(self._parser.get_method())
