"""Gateways and the servers behind them: fakes of Cog's server for most tests, and the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from chromium import DESKTOP, PHONE, Chromium, Screen
from gateways import KEY, Gateway
from node_clients import NodeClients
from page_user import PageUser

from benchmarks.fake_cog import FakeCog
from llama import ROOT
from llama.serving.schema import write_schema
from llama.serving.server import CogServer
from predict import Predictor


@pytest.fixture
def cog() -> Iterator[FakeCog]:
    """A fake of Cog's server. Change `cog.rules` to script it."""
    with FakeCog() as running:
        yield running


@pytest.fixture
def gateways(tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """Start a gateway: `gateways(cog.url, other.url, retention=1)`. All are stopped after the test."""
    with ExitStack() as stack:

        def start(
            *servers: str, file: Path | None = None, wiring: dict[str, Any] | None = None, **settings: Any
        ) -> Gateway:
            database = tmp_path / "gateway.sqlite3"
            gateway = Gateway(file or servers, **{"database": database, **settings}, wiring=wiring)
            stack.enter_context(gateway)
            gateway.wait_until_ready()
            return gateway

        yield start


@pytest.fixture
def gateway(cog: FakeCog, gateways: Callable[..., Gateway]) -> Gateway:
    """A gateway in front of `cog`."""
    return gateways(cog.url)


@pytest.fixture(scope="session")
def real_cog(embedded_folder: Path) -> Iterator[CogServer]:
    """Cog's own server with the embedded model."""
    write_schema(Predictor.run, ROOT)
    with CogServer({"LLAMA_WEIGHTS": str(embedded_folder)}) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="session")
def real_gateway(real_cog: CogServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway in front of Cog's own server. It has a deployment, and its webhooks may reach loopback."""
    database = tmp_path_factory.mktemp("gateway") / "gateway.sqlite3"
    settings: dict[str, Any] = {"deployments": "acme/llama", "webhook_networks": "127.0.0.0/8"}
    with Gateway([str(real_cog.client.base_url)], database, **settings) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="session")
def node_clients() -> NodeClients:
    """The JavaScript clients that `node/package.json` pins. Skips the test without Node.js."""
    return NodeClients()


@pytest.fixture(params=[DESKTOP, PHONE], ids=lambda screen: screen.name)
def screen(request: pytest.FixtureRequest) -> Screen:
    """The test runs once for each size of the window."""
    chosen: Screen = request.param
    return chosen


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    """One browser for all tests of a module. Not of the session: see `Chromium`."""
    with Chromium() as running:
        yield running


@pytest.fixture
def users(chromium: Chromium, gateways: object) -> Iterator[Callable[..., PageUser]]:
    """Open the page as a new user: `users(gateway, PHONE, key=None)`. At the end of the test, before `gateways`
    are stopped, no page may have done what a `Visit` records."""
    with ExitStack() as stack:

        def start(
            gateway: Gateway,
            screen: Screen = DESKTOP,
            *,
            key: str | None = KEY,
            address: str = "",
            **options: Any,
        ) -> PageUser:
            visit = stack.enter_context(chromium.visit(gateway.url, screen, **options))
            if key is not None:
                visit.log_in(key)
            return PageUser(visit.open(address))

        yield start
