"""HTTP/1.1 connections with limits that uvicorn does not have: for the size of a request's head, and for how
long a client may take to send a request or to read a response.

Knows bytes and clocks. Knows nothing about paths and keys: these limits protect the gateway from clients that
have no key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llama.gateway.http.parser import RequestParser

_TOO_LARGE = b"The URL and the headers of the request are too large."
_CHUNK_OVERHEAD = 8
"""How many bytes of a chunked body may come with each byte of its content: sizes and line breaks."""


@dataclass(frozen=True)
class Limits:
    """What a client may do. Times are in seconds."""

    head: int = 65536
    """The maximum size of a request's URL and headers, in bytes."""
    request: float = 30.0
    """How long a whole request may take to arrive."""
    reading: float = 60.0
    """How long a client may read nothing while data for it waits."""


def limited(limits: Limits) -> type[asyncio.Protocol]:
    """Return what uvicorn's setting `http` takes."""
    return cast("type[asyncio.Protocol]", partial(LimitedProtocol, limits=limits))


class LimitedProtocol(HttpToolsProtocol):
    """Closes connections that exceed the limits. The application then finds the client disconnected."""

    def __init__(self, *args: Any, limits: Limits, **members: Any) -> None:
        super().__init__(*args, **members)
        self.parser = RequestParser(self)  # type: ignore[assignment]
        self._limits = limits
        self._arriving, self._unread = _Timer(self.loop), _Timer(self.loop)
        self._head = 0
        """The bytes of the URL and the headers of the current request."""
        self._not_body = 0
        """The bytes of the current request that are not part of its body. The parser keeps a header to itself
        until the header ends."""
        self._behind_another = False
        """Whether the current request was sent before the one before it was answered."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arriving.start(self._limits.request, self._request_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._arriving.stop()
        self._unread.stop()
        super().connection_lost(exc)

    # --- the request

    def data_received(self, data: bytes) -> None:
        self._not_body += len(data)
        super().data_received(data)
        if not self._arriving.running and not self._responding():  # a blank line between two requests
            self._arriving.start(self._limits.request, self._request_is_late)
        if self._not_body > self._limits.head and not self.transport.is_closing():
            self._refuse()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = self._not_body = 0
        self._behind_another = self._responding()
        self._arriving.start(self._limits.request, self._request_is_late)

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._not_body -= len(body) * (1 + _CHUNK_OVERHEAD)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._arriving.stop()
        super().on_message_complete()

    def _count(self, size: int) -> None:
        self._head += size
        if self._head > self._limits.head:
            raise ValueError("the head of the request is too large")  # ends the parser, see below

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser could not read."""
        if self._head > self._limits.head:
            self._refuse()
        else:
            super().send_400_response(msg)

    def _refuse(self) -> None:
        if not self._responding():  # nothing may be written into a response that has begun
            head = f"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: {len(_TOO_LARGE)}\r\n"
            kind = "content-type: text/plain; charset=utf-8\r\nconnection: close\r\n\r\n"
            self.transport.write((head + kind).encode() + _TOO_LARGE)
        self.transport.close()

    def _request_is_late(self) -> None:
        if self._behind_another and self._responding():  # the server itself has stopped reading
            self._arriving.start(self._limits.request, self._request_is_late)
        else:
            self.transport.abort()

    def _responding(self) -> bool:
        return bool(self.pipeline) or (self.cycle is not None and not self.cycle.response_complete)

    # --- the response

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        self._unread.stop()
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._wait_for_reader()

    def _wait_for_reader(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._unread.start(self._limits.reading, partial(self._check_reader, waiting))

    def _check_reader(self, before: int) -> None:
        waiting = self.transport.get_write_buffer_size()
        if waiting >= before:
            self.transport.abort()
        elif waiting:
            self._wait_for_reader()


class _Timer:
    """Calls a function after some seconds, unless it is stopped or started again before."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        return self._handle is not None

    def start(self, seconds: float, function: Callable[[], None]) -> None:
        self.stop()
        self._handle = self._loop.call_later(seconds, function)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
