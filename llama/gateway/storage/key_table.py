"""The table of keys. The gateway reads it, and the command line changes it while the gateway runs."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from llama.gateway.storage.database import Database
from llama.gateway.storage.keys import Key, KeyLimits, new_webhook_secret


@dataclass(frozen=True)
class StoredKey:
    """A key with the fields that only authentication and the command line need."""

    key: Key
    hash: str | None
    created_at: float
    revoked_at: float | None


class KeyTable:
    """All keys, also the revoked ones, whose predictions and counts are kept."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def all(self) -> list[StoredKey]:
        """Return all keys, revoked ones included, in the order in which they were added."""
        return [_stored_key(row) for row in self._db.execute("SELECT * FROM keys ORDER BY id")]

    def add(self, name: str, key_hash: str | None, limits: KeyLimits = KeyLimits()) -> Key:  # noqa: B008
        """Add a key. Raises ValueError if a key with this name is in use."""
        values = {
            "name": name,
            "hash": key_hash,
            "webhook_secret": new_webhook_secret(),
            "created_at": time.time(),
            **_columns(limits),
        }
        try:
            with self._db.transaction():
                cursor = self._db.execute(
                    f"INSERT INTO keys ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})",
                    [*values.values()],
                )
        except sqlite3.IntegrityError as error:
            raise ValueError(f"a key named {name} exists") from error
        assert cursor.lastrowid is not None
        return Key(cursor.lastrowid, name, limits, str(values["webhook_secret"]))

    def find(self, name: str) -> Key | None:
        """Return the key with this name that is in use."""
        found = (stored.key for stored in self.all() if stored.key.name == name and not stored.revoked_at)
        return next(found, None)

    def set_limits(self, key: Key, limits: KeyLimits) -> None:
        """Replace the limits of a key."""
        values = _columns(limits)
        with self._db.transaction():
            self._db.execute(
                f"UPDATE keys SET {', '.join(f'{name} = ?' for name in values)} WHERE id = ?",
                [*values.values(), key.id],
            )

    def revoke(self, name: str) -> bool:
        """Revoke a key. Returns False if no key with this name is in use."""
        with self._db.transaction():
            return (
                self._db.execute(
                    "UPDATE keys SET revoked_at = ? WHERE name = ? AND revoked_at IS NULL",
                    (time.time(), name),
                ).rowcount
                > 0
            )

    def ensure(self, name: str, key_hash: str | None) -> Key:
        """Return the key with this name, and set its hash. Adds the key if there is none."""
        for stored in self.all():
            if stored.key.name == name and stored.revoked_at is None:
                if stored.hash != key_hash:
                    with self._db.transaction():
                        self._db.execute("UPDATE keys SET hash = ? WHERE id = ?", (key_hash, stored.key.id))
                return stored.key
        return self.add(name, key_hash)


def _columns(limits: KeyLimits) -> dict[str, Any]:
    dollars = limits.monthly_dollars
    # SQLite has no decimal type, and a float would round.
    return {**vars(limits), "monthly_dollars": None if dollars is None else str(dollars)}


def _stored_key(row: sqlite3.Row) -> StoredKey:
    dollars = row["monthly_dollars"]
    limits = KeyLimits(
        row["requests_per_minute"],
        row["at_once"],
        row["monthly_tokens"],
        None if dollars is None else Decimal(dollars),
    )
    key = Key(row["id"], row["name"], limits, row["webhook_secret"])
    return StoredKey(key, row["hash"], row["created_at"], row["revoked_at"])
