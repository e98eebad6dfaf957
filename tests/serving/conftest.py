"""Cog's server with a small model, started once for all tests in this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from server_clients import BYTES_PER_TOKEN, WebhookReceiver, tiny_server
from small_models import CONTEXT

from llama import ROOT
from llama.serving.schema import write_schema
from llama.serving.server import CogServer
from predict import Predictor


@pytest.fixture(scope="session")
def schema() -> None:
    write_schema(Predictor.run, ROOT)


@pytest.fixture(scope="session")
def server_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "output.log"


@pytest.fixture(scope="session")
def server(schema: None, llama_folder: Path, server_log: Path) -> Iterator[CogServer]:
    with server_log.open("wb") as output, tiny_server(llama_folder, output=output) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="session")
def narrow_server(schema: None, llama_folder: Path) -> Iterator[CogServer]:
    """A server that accepts two predictions but has a key/value cache for one, so that the other waits."""
    cache = str(BYTES_PER_TOKEN * CONTEXT)
    with tiny_server(llama_folder, COG_MAX_CONCURRENCY="2", LLAMA_CACHE_MEMORY=cache) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def webhooks() -> Iterator[WebhookReceiver]:
    with WebhookReceiver() as receiver:
        yield receiver
