"""The commands `keys add`, `list` and `revoke`, which manage the keys of the gateway's clients.

They write to the gateway's database, and a running gateway notices within a second.
"""

from __future__ import annotations

import re
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated

import typer

from llama.cli.terminal import command
from llama.errors import BadSettings
from llama.gateway.access.auth import RESERVED_NAMES
from llama.gateway.settings import GatewaySettings
from llama.gateway.storage.key_table import StoredKey
from llama.gateway.storage.keys import hash_of, new_key
from llama.gateway.storage.store import Store
from llama.settings import expanded

keys = typer.Typer(
    help="Manage the keys of the gateway's clients. LLAMA_GATEWAY_DATABASE names the file that stores them.",
    no_args_is_help=True,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_COLUMNS = ("NAME", "PER MINUTE", "AT ONCE", "CREATED (UTC)", "REVOKED (UTC)")

NameArgument = Annotated[
    str,
    typer.Argument(
        help="A name for the key, such as that of its owner. The names local and environment are reserved."
    ),
]


@keys.command()
@command
def add(
    name: NameArgument,
    requests_per_minute: Annotated[
        int | None,
        typer.Option(min=1, help="How many predictions the key may create per minute. No limit if omitted."),
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many of the key's predictions run at the same time; others wait. No limit if omitted.",
        ),
    ] = None,
) -> None:
    """Add a key and print it. It cannot be shown again, because only a hash of it is stored."""
    _check_name(name)
    key = new_key()
    with _store() as store:
        try:
            store.keys.add(name, hash_of(key), requests_per_minute, at_once)
        except ValueError as error:
            raise BadSettings(f"a key named {name} exists; choose another name or revoke that key") from error
    print(key)
    print(f"This is the key {name}. Store it now: it cannot be shown again.", file=sys.stderr)


@keys.command(name="list")
@command
def list_keys() -> None:
    """Print the names, limits and dates of all keys."""
    with _store() as store:
        everything = store.keys.all()
    found = [stored for stored in everything if stored.key.name not in RESERVED_NAMES]
    if not found:
        print("There are no keys; `keys add NAME` adds one.", file=sys.stderr)
        return
    rows = [_COLUMNS, *(_row(stored) for stored in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@keys.command()
@command
def revoke(name: NameArgument) -> None:
    """Revoke a key. Within about a second, a running gateway refuses it and cancels its predictions."""
    _check_name(name)
    with _store() as store:
        if not store.keys.revoke(name):
            raise BadSettings(f"there is no key named {name}, or it is revoked; `keys list` lists all keys")
    print(f"The key {name} is revoked.", file=sys.stderr)


def _check_name(name: str) -> None:
    if name in RESERVED_NAMES:
        raise BadSettings(f"the name {name} is reserved for {RESERVED_NAMES[name]}; choose another name")
    if not _NAME.fullmatch(name):
        raise BadSettings(
            f"the name is {name!r}, but it must have 1 to 64 letters, digits and . _ @ - and start with a "
            "letter or digit; choose another name"
        )


@contextmanager
def _store() -> Iterator[Store]:
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


def _row(stored: StoredKey) -> tuple[str, ...]:
    key = stored.key
    return (
        key.name,
        _limit(key.requests_per_minute),
        _limit(key.at_once),
        _date(stored.created_at),
        "" if stored.revoked_at is None else _date(stored.revoked_at),
    )


def _limit(number: int | None) -> str:
    return "no limit" if number is None else str(number)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
