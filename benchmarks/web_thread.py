"""Run an ASGI application on a free loopback port, in a thread of this process.

Knows sockets and uvicorn. Knows nothing about what the application does.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import uvicorn


class WebThread:
    """A context manager that listens on `port` (0: a free one) until it is left.

    Leaving it drops all connections. An application with a lifespan is ended in order, and has `grace`
    seconds for its running responses.
    """

    def __init__(self, app: Any, *, port: int = 0, grace: float = 0, lifespan: bool = False) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self.port = int(self._socket.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            app,
            lifespan="on" if lifespan else "off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=60,
        )
        self._server = uvicorn.Server(config)
        self._grace, self._lifespan = grace, lifespan
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
            with suppress(asyncio.CancelledError):
                await self._serving

        with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
            runner.run(serve())
        self._socket.close()

    def __enter__(self) -> Self:
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                self._socket.close()
                raise RuntimeError("the application did not start; the log has the reason")
            time.sleep(0.005)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lifespan:
            self._server.should_exit = True
            self._thread.join(self._grace)
        if self._thread.is_alive():
            self.drop_connections()
            if not self._lifespan:  # nothing has to be ended in order, and uvicorn takes its time for that
                self.call(self._serving.cancel)
            self._thread.join(60)
        assert not self._thread.is_alive(), "the application did not stop"

    def call(self, function: Callable[[], object]) -> None:
        """Run `function` in the thread of the server, and return when it has been called."""
        done = threading.Event()

        def run() -> None:
            try:
                function()
            finally:
                done.set()

        if threading.current_thread() is self._thread:
            run()
        else:
            self._loop.call_soon_threadsafe(run)
            assert done.wait(60), "the server's thread is blocked"

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the server's event loop, and return when it has ended."""
        asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def refuse_connections(self) -> None:
        """Stop listening, and close the connections on which nothing is running."""

        def close() -> None:
            for server in self._server.servers:
                server.close()
            shut_down()
            # Again, because a connection may have been accepted and not have been counted yet.
            asyncio.get_running_loop().call_later(0.2, shut_down)

        def shut_down() -> None:
            for connection in list(self._server.server_state.connections):
                connection.shutdown()

        self.call(close)

    def drop_connections(self) -> None:
        """Stop listening and drop all connections, as the end of a process does."""

        def drop() -> None:
            for server in self._server.servers:
                server.close()
            for connection in list(self._server.server_state.connections):
                # `connection.transport` is None for a moment while a connection is made.
                if transport := getattr(connection, "transport", None):
                    transport.abort()

        self.call(drop)
