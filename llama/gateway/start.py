"""Runs a gateway in this process, with uvicorn, until a signal ends it."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from ipaddress import ip_address

import uvicorn

from llama.errors import BadSettings
from llama.gateway.access.auth import RESERVED_NAMES
from llama.gateway.app import create_app
from llama.gateway.dispatch.addresses import Addresses
from llama.gateway.gateway import Gateway
from llama.gateway.settings import GatewaySettings
from llama.gateway.storage.key_table import StoredKey
from llama.gateway.storage.store import Store
from llama.settings import expanded

_GRACE = 30  # seconds that running answers have to end
_IDLE = 75  # seconds; clients keep connections open, and a short limit closes them while they are used again


def prepare(settings: GatewaySettings, addresses: Addresses, address: str) -> Gateway:
    """Build a gateway that will listen on this IP address.

    Raises BadSettings if it would be open to other machines without a key, or if its database cannot be
    opened.
    """
    loopback = ip_address(address).is_loopback
    if not loopback and settings.key is None and not any(not key.revoked_at for key in _keys(settings)):
        raise BadSettings(
            f"without a key, the gateway can listen on a loopback address only, not on {address}; add a key "
            "with `python -m llama keys add NAME`, or set LLAMA_GATEWAY_KEY"
        )
    return Gateway(settings, addresses, loopback=loopback, grace=_GRACE)


def needs_key(settings: GatewaySettings) -> bool:
    """Whether clients need a key. Revoking the last key does not open the gateway again."""
    return settings.key is not None or bool(_keys(settings))


def _keys(settings: GatewaySettings) -> list[StoredKey]:
    """The keys of `keys add`, revoked ones included."""
    store = Store(expanded(settings.database, "LLAMA_GATEWAY_DATABASE"))
    try:
        return [stored for stored in store.keys.all() if stored.key.name not in RESERVED_NAMES]
    finally:
        store.close()


def run(gateway: Gateway, address: str, port: int, on_start: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM. SIGHUP reads the list of servers again. `on_start` is called when the
    gateway listens."""
    config = uvicorn.Config(
        create_app(gateway),
        host=address,
        port=port,
        lifespan="on",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # base_url.py reads them
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=_GRACE,
    )
    _Server(config, gateway, on_start).run()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, gateway: Gateway, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._gateway, self._on_start = gateway, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, self._gateway.servers.reload)
            self._on_start()
