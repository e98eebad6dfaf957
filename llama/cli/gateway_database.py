"""Opens the gateway's database for the commands that read or change it while a gateway runs."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from llama.errors import BadSettings
from llama.gateway.settings import GatewaySettings
from llama.gateway.storage.store import Store
from llama.settings import expanded


@contextmanager
def open_store(settings: GatewaySettings, *, create: bool = False) -> Iterator[Store]:
    """Open the gateway's database. If it is created, say so.

    Raises BadSettings if it cannot be used, or if it does not exist and `create` is false.
    """
    path = expanded(settings.database, "LLAMA_GATEWAY_DATABASE")
    is_new = not path.exists()
    if is_new and not create:
        raise BadSettings(
            f"there is no database {path}; set LLAMA_GATEWAY_DATABASE to the gateway's file, or create it by "
            "starting a gateway or with `keys add`"
        )
    store = Store(path)
    if is_new:
        print(f"The database {path} is new. Gateways with another one do not know its keys.", file=sys.stderr)
    try:
        yield store
    except sqlite3.Error as error:
        raise BadSettings(
            f"the database {path} cannot be used ({error}); check the disk, and that "
            "LLAMA_GATEWAY_DATABASE is a file that can be written"
        ) from error
    finally:
        store.close()
