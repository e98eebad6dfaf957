"""A gateway on a loopback port, in a thread of the tests, and what tests ask it.

All requests are real HTTP. Knows predictions and keys; knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2
from server_clients import Body, until

from benchmarks.web_thread import WebThread
from llama.gateway import gateway
from llama.gateway.app import create_app
from llama.gateway.dispatch.addresses import Addresses
from llama.gateway.settings import GatewaySettings
from llama.gateway.start import GatewayServer
from llama.gateway.storage.keys import KeyLimits, hash_of, new_key
from llama.gateway.storage.store import Store

KEY = "test"
MODEL = "meta/llama-2-70b-chat"


def port_of(server: GatewayServer) -> int:
    """The port of a server that has started with port 0, so that no other test can take it first."""
    port: int = server.servers[0].sockets[0].getsockname()[1]
    return port


class Gateway:
    """A context manager that runs a gateway in front of `servers`, with the key "test". `servers` can be a file.

    `settings`: fields of GatewaySettings. `wiring`: other arguments of `llama.gateway.gateway.Gateway`.
    """

    def __init__(
        self,
        servers: Sequence[str] | Path,
        database: Path,
        *,
        wiring: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self._servers, self._wiring = servers, wiring or {}
        self.settings = GatewaySettings(**{"key": KEY, "database": database, **settings})
        self._port = 0

    def __enter__(self) -> Self:
        self._start()
        return self

    def _start(self) -> None:
        wiring = {"grace": 1.0, **self._wiring}
        self.inside = gateway.Gateway(self.settings, self._addresses(), **wiring)
        self._web = WebThread(create_app(self.inside), port=self._port, lifespan=True)
        self._web.__enter__()
        self._port, self.url = self._web.port, self._web.url
        self.client = self.client_of(KEY)

    def _addresses(self) -> Addresses:
        return Addresses((), self._servers) if isinstance(self._servers, Path) else Addresses(self._servers)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self._web.__exit__(kind, error, trace)

    def restart(self) -> None:
        """Stop the gateway as Ctrl-C does, and start another one with the same database and port."""
        self.__exit__(None, None, None)
        self._start()

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the gateway's event loop, with the parts of `inside`."""
        self._web.run(work)

    def client_of(self, key: str | None) -> httpx2.Client:
        """Return a client that sends this key, or none."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def add_key(self, name: str, **limits: Any) -> str:
        """Add a key as the command line does, wait until the gateway knows it, and return it. `limits`: fields
        of KeyLimits."""
        key = new_key()
        with self._command_line() as store:
            store.keys.add(name, hash_of(key), KeyLimits(**limits))
        until(lambda: self.inside.keys.find(key))
        return key

    def set_limits(self, name: str, **limits: Any) -> None:
        """Replace the limits of a key as the command line does, and wait until the gateway knows them."""
        new = KeyLimits(**limits)
        with self._command_line() as store:
            key = store.keys.find(name)
            assert key is not None
            store.keys.set_limits(key, new)
        until(lambda: (known := self.inside.keys.by_id(key.id)) is not None and known.limits == new)

    def revoke(self, name: str) -> None:
        """Revoke a key as the command line does, and wait until the gateway knows it."""
        with self._command_line() as store:
            assert store.keys.revoke(name)
        until(lambda: name not in {stored.key.name for stored in self.inside.keys.in_use()})

    @contextmanager
    def _command_line(self) -> Iterator[Store]:
        """The database as the command line opens it."""
        store = Store(self.settings.database)
        try:
            yield store
        finally:
            store.close()

    def wait_until_ready(self) -> None:
        until(lambda: self.client.get("/readyz").status_code == 200)

    def create(self, *, client: httpx2.Client | None = None, prefer: str = "", **inputs: Any) -> Body:
        """Create a prediction and return it. `prefer`: the header, such as "wait"."""
        response = (client or self.client).post(
            f"/v1/models/{self.settings.model}/predictions",
            json={"input": {"prompt": "Hello", **inputs}},
            headers={"Prefer": prefer} if prefer else {},
        )
        assert response.is_success, response.text
        body: Body = response.json()
        return body

    def get(self, prediction: Body) -> Body:
        response = self.client.get(f"/v1/predictions/{prediction['id']}")
        assert response.status_code == 200, response.text
        body: Body = response.json()
        return body

    def wait_for(self, prediction: Body, *statuses: str) -> Body:
        """Wait until a prediction has one of these statuses; without any, until it has ended."""
        wanted = statuses or ("succeeded", "failed", "canceled")
        until(lambda: self.get(prediction)["status"] in wanted)
        return self.get(prediction)
