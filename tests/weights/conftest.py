from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pulling import FILES, TOKEN, write_manifest
from weights_server import (
    Server,
)

from llama.settings import Settings


@pytest.fixture(autouse=True)
def no_proxy_and_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "LLAMA_WEIGHTS", "LLAMA_WEIGHTS_MANIFEST", "LLAMA_WEIGHTS_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        server.files = {f"/{name}": data for name, data in FILES.items()}
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "weights"


@pytest.fixture
def settings(server: Server, tmp_path: Path) -> Settings:
    """The server's files without hashes, and a token."""
    manifest = write_manifest(tmp_path / "weights.txt", server.url)
    return Settings(weights_manifest=manifest, HF_TOKEN=TOKEN)


@pytest.fixture
def hashed(server: Server, tmp_path: Path) -> Settings:
    manifest = write_manifest(tmp_path / "hashed.txt", server.url, hashes=True)
    return Settings(weights_manifest=manifest, HF_TOKEN=TOKEN)
