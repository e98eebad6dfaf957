"""Opens the gateway's database for the commands that read or change it while a gateway runs."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from llama.errors import BadSettings
from llama.gateway.settings import GatewaySettings
from llama.gateway.storage.store import Store
from llama.settings import expanded


@contextmanager
def open_store() -> Iterator[Store]:
    """Open the database that LLAMA_GATEWAY_DATABASE names. Raises BadSettings if it cannot be used."""
    settings = GatewaySettings.from_environment()
    path = expanded(settings.database, "LLAMA_GATEWAY_DATABASE")
    store = Store(path)
    try:
        yield store
    except sqlite3.Error as error:
        raise BadSettings(
            f"the database {path} cannot be used ({error}); check the disk, and that "
            "LLAMA_GATEWAY_DATABASE is a file that can be written"
        ) from error
    finally:
        store.close()
