"""The commands `keys add`, `limit`, `list` and `revoke`, which manage the keys of the gateway's clients.

They write to the gateway's database, and a running gateway notices the change within about a second.
"""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

import typer

from llama.cli.gateway_database import open_store
from llama.cli.terminal import command, print_table
from llama.errors import BadSettings
from llama.gateway.access.auth import RESERVED_NAMES
from llama.gateway.settings import GatewaySettings
from llama.gateway.storage.key_table import StoredKey
from llama.gateway.storage.keys import KeyLimits, hash_of, new_key

keys = typer.Typer(
    help="Manage the keys of the gateway's clients. LLAMA_GATEWAY_DATABASE names the file that stores them. "
    "It must be the file of the gateway.",
    no_args_is_help=True,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_NO_LIMIT = "none"
_MAX_LIMIT = 2**53
_COLUMNS = (
    "NAME",
    "PER MINUTE",
    "AT ONCE",
    "TOKENS/MONTH",
    "DOLLARS/MONTH",
    "CREATED (UTC)",
    "REVOKED (UTC)",
)

NewName = Annotated[
    str,
    typer.Argument(
        help="A name for the key, such as its owner's. The names local and environment are reserved."
    ),
]
ExistingName = Annotated[str, typer.Argument(help="The name of the key.")]


def _limit_of(kind: type[int] | type[Decimal], text: str) -> Any:
    """An option whose value is a positive number or the word `none`."""

    def parse(value: str) -> int | Decimal | str:
        if value == _NO_LIMIT:
            return value
        with suppress(ValueError, InvalidOperation):  # comparing NaN raises the second one
            number = kind(value)
            if 0 < number < _MAX_LIMIT:
                return number
        raise typer.BadParameter(f"{value!r} is neither a positive number nor {_NO_LIMIT!r}.")

    return typer.Option(
        parser=parse, metavar=f"{'INTEGER' if kind is int else 'DOLLARS'}|{_NO_LIMIT}", help=text
    )


RequestsPerMinute = Annotated[Any, _limit_of(int, "How many predictions the key may create per minute.")]
AtOnce = Annotated[
    Any, _limit_of(int, "How many of the key's predictions run at the same time; others wait.")
]
MonthlyTokens = Annotated[
    Any, _limit_of(int, "How many tokens, input and output together, the key may use in a month (UTC).")
]
MonthlyDollars = Annotated[
    Any, _limit_of(Decimal, "How many dollars the tokens of the key may cost in a month (UTC).")
]


@keys.command()
@command
def add(
    name: NewName,
    requests_per_minute: RequestsPerMinute = None,
    at_once: AtOnce = None,
    monthly_tokens: MonthlyTokens = None,
    monthly_dollars: MonthlyDollars = None,
) -> None:
    """Add a key and print it.

    It cannot be shown again, because only a hash of it is stored. Without options, it has no limits.
    """
    _check_name(name)
    key = new_key()
    limits = _changed(
        KeyLimits(),
        requests_per_minute=requests_per_minute,
        at_once=at_once,
        monthly_tokens=monthly_tokens,
        monthly_dollars=monthly_dollars,
    )
    with open_store(GatewaySettings.from_environment(), create=True) as store:
        try:
            store.keys.add(name, hash_of(key), limits)
        except ValueError as error:
            raise BadSettings(f"a key named {name} exists; choose another name or revoke that key") from error
    print(key)
    print(f"This is the key {name}. Store it now: it cannot be shown again.", file=sys.stderr)


@keys.command()
@command
def limit(
    name: ExistingName,
    requests_per_minute: RequestsPerMinute = None,
    at_once: AtOnce = None,
    monthly_tokens: MonthlyTokens = None,
    monthly_dollars: MonthlyDollars = None,
) -> None:
    """Change the limits of a key. A limit that is not given stays as it is; `none` removes it."""
    _check_name(name)
    given = {
        "requests_per_minute": requests_per_minute,
        "at_once": at_once,
        "monthly_tokens": monthly_tokens,
        "monthly_dollars": monthly_dollars,
    }
    if all(value is None for value in given.values()):
        raise BadSettings("no limit is given; give at least one option, such as --monthly-dollars 20")
    with open_store(GatewaySettings.from_environment()) as store, store.transaction():
        key = store.keys.find(name)
        if key is None:
            raise BadSettings(f"no key named {name} is in use; `keys list` lists all keys")
        store.keys.set_limits(key, _changed(key.limits, **given))
    print(f"The limits of the key {name} are changed.", file=sys.stderr)


@keys.command(name="list")
@command
def list_keys() -> None:
    """Print the names, limits and dates of all keys."""
    with open_store(GatewaySettings.from_environment()) as store:
        everything = store.keys.all()
    found = [stored for stored in everything if stored.key.name not in RESERVED_NAMES]
    if not found:
        print("There are no keys; `keys add NAME` adds one.", file=sys.stderr)
        return
    print_table([_COLUMNS, *(_row(stored) for stored in found)])


@keys.command()
@command
def revoke(name: ExistingName) -> None:
    """Revoke a key. Within about a second, a running gateway refuses it and cancels its predictions."""
    _check_name(name)
    with open_store(GatewaySettings.from_environment()) as store:
        if not store.keys.revoke(name):
            raise BadSettings(f"no key named {name} is in use; `keys list` lists all keys")
    print(f"The key {name} is revoked.", file=sys.stderr)


def _check_name(name: str) -> None:
    if name in RESERVED_NAMES:
        raise BadSettings(f"the name {name} is reserved for {RESERVED_NAMES[name]}; choose another name")
    if not _NAME.fullmatch(name):
        raise BadSettings(
            f"the name is {name!r}, but it must have 1 to 64 characters, begin with a letter or a digit, and "
            "contain only letters, digits and . _ @ -; choose another name"
        )


def _changed(limits: KeyLimits, **given: int | Decimal | str | None) -> KeyLimits:
    """Return the limits after replacing those that are given."""
    new: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(limits, **{name: None if value == _NO_LIMIT else value for name, value in new.items()})


def _row(stored: StoredKey) -> tuple[str, ...]:
    limits = stored.key.limits
    return (
        stored.key.name,
        _limit(limits.requests_per_minute),
        _limit(limits.at_once),
        _limit(limits.monthly_tokens),
        _limit(limits.monthly_dollars),
        _date(stored.created_at),
        "" if stored.revoked_at is None else _date(stored.revoked_at),
    )


def _limit(number: int | Decimal | None) -> str:
    return "no limit" if number is None else f"{number:f}" if isinstance(number, Decimal) else str(number)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
