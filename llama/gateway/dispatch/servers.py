"""The servers behind the gateway: which are ready, how many places each has, and which one is next.

Asks `/health-check` every second. Knows nothing about predictions.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from llama.gateway.dispatch.addresses import Addresses, ServerAddress
from llama.gateway.dispatch.affinity import Affinity, continues, dialogue_of
from llama.gateway.dispatch.cog_client import CogClient, NotListening, Unavailable
from llama.gateway.model_card import check_schema
from llama.gateway.repeat import repeat

logger = logging.getLogger(__name__)

_READY = ("READY", "BUSY")


class Server:
    """One server. `in_flight` predictions run on it."""

    def __init__(self, address: ServerAddress, places: int) -> None:
        self.url, self.host = address.url, address.host
        self._places = places
        self.in_flight = 0
        self.ready = False
        self.checked = False
        """Whether it has had a health check. The first result is logged even if it is not ready."""
        self.listed = True
        """False when it is no longer on the list. Its running predictions go on."""
        self.full_until = 0.0
        """Until this time of the monotonic clock it counts as full, because it refused a prediction."""
        self.responded_at = time.monotonic()
        """When it last responded to a health check."""
        self.check_now = asyncio.Event()

    @property
    def free(self) -> int:
        """The number of free places."""
        if not self.ready or not self.listed or time.monotonic() < self.full_until:
            return 0
        return self._places - self.in_flight

    def suspect(self) -> None:
        """A prediction failed on it: do not use it before its next health check."""
        self.ready = False
        self.check_now.set()


class Servers:
    """All servers. Run `watch` in a task; it calls `on_ready` when a server becomes ready, and `on_lost` with
    a server that has not responded for `lost_after` seconds."""

    def __init__(
        self,
        client: CogClient,
        addresses: Addresses,
        places: int,
        *,
        interval: float = 1.0,
        lost_after: float = 30.0,
    ) -> None:
        self._client, self._addresses, self._places = client, addresses, places
        self._interval, self._lost_after = interval, lost_after
        self._watched = dict[ServerAddress, tuple[Server, asyncio.Task[None]]]()
        self._affinity = Affinity()
        self.on_ready: Callable[[], None] = lambda: None
        self.on_lost: Callable[[Server], None] = lambda _: None
        self.on_schema: Callable[[dict[str, Any]], Awaitable[None]] = _ignore
        self.schema: dict[str, Any] | None = None
        """The OpenAPI schema of the model, once a server was ready."""

    @property
    def all(self) -> list[Server]:
        """The servers on the list."""
        return [server for server, _ in self._watched.values() if server.listed]

    @property
    def any_ready(self) -> bool:
        return any(server.ready for server in self.all)

    @property
    def any_free(self) -> bool:
        return any(server.free > 0 for server in self.all)

    def choose(self, inputs: Mapping[str, Any]) -> Server:
        """Return the server for a prediction. At least one server must have a free place.

        For the next turn of a dialogue, it is the server that has the dialogue's prefix, if it has a free
        place. Otherwise it is the one with the most free places.
        """
        free = [server for server in self.all if server.free > 0]
        dialogue = dialogue_of(inputs)
        known = self._affinity.server_of(dialogue) if continues(inputs) else None
        server = next((s for s in free if s.url == known), None) or max(free, key=lambda s: s.free)
        self._affinity.remember(dialogue, server.url)
        return server

    def reload(self) -> None:
        """Read the list of servers again."""
        self._addresses.reload()

    async def watch(self) -> None:
        """Follow the list of servers and their health until cancelled."""
        try:
            await repeat(self._follow_list, self._interval)
        finally:
            for _, task in self._watched.values():
                task.cancel()

    async def _follow_list(self) -> None:
        addresses = await self._addresses.current()
        for address in addresses:
            if address not in self._watched:
                server = Server(address, self._places)
                self._watched[address] = server, asyncio.create_task(self._watch_server(server))
        for address, (server, task) in list(self._watched.items()):
            if server.listed and address not in addresses:
                logger.info("the server %s is no longer listed", server.url)
            server.listed = address in addresses
            if not server.listed and server.in_flight == 0:  # watched until then, because it can be lost
                task.cancel()
                del self._watched[address]

    async def _watch_server(self, server: Server) -> None:
        async def check_and_wait() -> None:
            await self._check(server)
            with suppress(TimeoutError):
                await asyncio.wait_for(server.check_now.wait(), self._interval)
                server.check_now.clear()

        # The pause keeps a server that has just failed from being checked again at once.
        await repeat(check_and_wait, min(0.1, self._interval))

    async def _check(self, server: Server) -> None:
        status = await self._health(server)
        if status is not None:
            server.responded_at = time.monotonic()
        ready = status in _READY
        if ready != server.ready or not server.checked:
            server.checked = True
            logger.info(
                "the server %s is %s",
                server.url,
                "ready" if ready else f"not ready ({status or 'no response'})",
            )
            if ready:  # it may be another version of the model than before
                await self._fetch_schema(server)
            server.ready = ready
        if ready:
            self.on_ready()
        elif time.monotonic() - server.responded_at > self._lost_after:
            self.on_lost(server)

    async def _health(self, server: Server) -> str | None:
        """The status that a server reports; None if it does not respond."""
        try:
            return str((await self._client.ask(f"{server.url}/health-check", server.host))["status"])
        except NotListening:  # its running predictions detect its end by their own connections
            server.responded_at = time.monotonic()
            return None
        except (Unavailable, KeyError, TypeError):
            return None

    async def _fetch_schema(self, server: Server) -> None:
        try:
            schema = await self._client.ask(f"{server.url}/openapi.json", server.host)
            check_schema(schema)
        except (Unavailable, ValueError) as error:
            logger.warning("the server %s has no usable /openapi.json (%s)", server.url, error)
            return
        if schema != self.schema:
            self.schema = schema
            await self.on_schema(schema)


async def _ignore(_: dict[str, Any]) -> None:
    """The default of `on_schema`."""
