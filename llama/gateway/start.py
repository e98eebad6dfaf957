"""Runs a gateway in this process, with uvicorn, until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from types import FrameType

import uvicorn
from pydantic import ValidationError
from uvicorn.config import LOGGING_CONFIG

from llama.errors import BadSettings
from llama.gateway.access.auth import RESERVED_NAMES
from llama.gateway.app import create_app
from llama.gateway.dispatch.addresses import Addresses
from llama.gateway.gateway import Gateway
from llama.gateway.http.protocol import Limits, limited
from llama.gateway.http.tls import Certificate
from llama.gateway.logs import configure
from llama.gateway.settings import GatewaySettings
from llama.gateway.storage.store import Store
from llama.settings import expanded

logger = logging.getLogger(__name__)

_GRACE = 25  # seconds that running predictions have to end; webhooks have 5 more
_MAX_FILES = 65536  # if the system has no limit
_TICKS = 10  # of uvicorn's main loop: about one second
_IDLE = 75  # seconds; a short limit could close a connection just when its client uses it again


def read_settings() -> GatewaySettings:
    """Read the settings of the gateway. The log gets its format first, because unknown settings are logged.

    Raises BadSettings if a setting is invalid.
    """
    with suppress(ValidationError):  # an invalid setting is reported below
        configure(GatewaySettings().log_format)
    return GatewaySettings.from_environment()


def prepare(settings: GatewaySettings, addresses: Addresses, address: str) -> Gateway:
    """Build a gateway that will listen on this IP address.

    Raises BadSettings if it would be open to other machines without a key, or if its database cannot be
    opened.
    """
    loopback = ip_address(address).is_loopback
    if not loopback and settings.key is None and not _has_key(settings):
        raise BadSettings(
            f"without a key, the gateway can listen on a loopback address only, not on {address}; add a key "
            "with `python -m llama keys add NAME`, or set LLAMA_GATEWAY_KEY"
        )
    return Gateway(settings, addresses, loopback=loopback, grace=_GRACE)


def _has_key(settings: GatewaySettings) -> bool:
    """Whether a key of `keys add` is in use."""
    store = Store(expanded(settings.database, "LLAMA_GATEWAY_DATABASE"))
    try:
        added = [stored for stored in store.keys.all() if stored.key.name not in RESERVED_NAMES]
        return any(stored.revoked_at is None for stored in added)
    finally:
        store.close()


def run(
    gateway: Gateway,
    address: str,
    port: int,
    on_start: Callable[[], None],
    *,
    reloads: bool = False,
    certificate: Certificate | None = None,
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP. If `reloads`, SIGHUP reads the list of servers again instead.
    `on_start` is called when the gateway listens. With a certificate, the gateway speaks HTTPS."""
    _allow_many_files()
    GatewayServer(gateway, address, port, on_start, reloads=reloads, certificate=certificate).run()


def _allow_many_files() -> None:
    """Raise the limit of open files to its maximum: every waiting client is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # some systems have a lower limit that they do not report
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _config(
    gateway: Gateway, address: str, port: int, grace: int, limits: Limits, certificate: Certificate | None
) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(gateway),
        http=limited(limits),
        host=address,
        port=port,
        lifespan="on",
        ws="none",
        # None: uvicorn's log goes to the handlers of the root logger, which write JSON.
        log_config=LOGGING_CONFIG if gateway.settings.log_format == "text" else None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # base_url.py reads them
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=grace,
        ssl_context_factory=None if certificate is None else lambda _, __: certificate.context,
    )


class GatewayServer(uvicorn.Server):
    """uvicorn's server, with the gateway's signals, limits and end."""

    def __init__(
        self,
        gateway: Gateway,
        address: str,
        port: int,
        on_start: Callable[[], None],
        *,
        reloads: bool = False,
        grace: int = _GRACE,
        limits: Limits = Limits(),  # noqa: B008  (it is immutable)
        certificate: Certificate | None = None,
    ) -> None:
        """`grace`: how many seconds open connections have when the gateway ends. The running predictions have
        the gateway's own grace, at the same time."""
        super().__init__(_config(gateway, address, port, grace, limits, certificate))
        self._gateway, self._on_start, self._reloads = gateway, on_start, reloads
        self._certificate = certificate
        self._stop_requested = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._loop = asyncio.get_running_loop()
            self._on_start()

    async def on_tick(self, counter: int) -> bool:
        if self._certificate is not None and counter % _TICKS == 0:
            self._certificate.reload_if_changed()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._gateway.stop_starting()
        if running := len(self._gateway.predictions.running):
            logger.info(
                "stopping; running predictions (%d) have %d s to end; press Ctrl-C again to stop now",
                running,
                self.config.timeout_graceful_shutdown,
            )
        await super().shutdown(sockets)
        logger.info("the gateway has stopped")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and self.started and not self._stop_requested:
            self._stop_requested = True
            self._loop.call_soon_threadsafe(self._gateway.stop_now)
        else:  # the first signal, and a third, which ends the process without storing anything
            super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # by nohup
            if threading.current_thread() is not threading.main_thread() or (ignored and not self._reloads):
                yield
                return
            previous = signal.signal(signal.SIGHUP, self._hang_up)
            try:
                yield
            finally:
                signal.signal(signal.SIGHUP, previous)

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        if not self._reloads:
            self.handle_exit(number, frame)  # which raises the signal again at the end
        elif self.started:
            self._loop.call_soon_threadsafe(self._gateway.servers.reload)
