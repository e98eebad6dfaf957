"""Tells which key a request was made with, from its Authorization header.

Reads the keys from the store, and reads them again every second, so that a key that the command line adds or
revokes takes effect while the gateway runs.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable

from llama.gateway.problems import Problem
from llama.gateway.storage.key_table import StoredKey
from llama.gateway.storage.keys import Key, hash_of, same
from llama.gateway.storage.storage import Storage

logger = logging.getLogger(__name__)

ENVIRONMENT, LOCAL = "environment", "local"
RESERVED_NAMES = {ENVIRONMENT: "the key in LLAMA_GATEWAY_KEY", LOCAL: "requests to a gateway without keys"}
"""Names that the gateway itself gives, and what they stand for."""

_SECONDS_FRESH = 1.0
_PATIENCE = 1.0
"""Seconds to wait for the database. After that, the last known keys are used."""


class Keys:
    """All keys. If there has never been one and the gateway listens on loopback only, it is open: requests
    need no key, and all of them belong to the key "local"."""

    def __init__(
        self,
        storage: Storage,
        *,
        environment_key: str | None,
        loopback: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage, self._loopback, self._clock = storage, loopback, clock
        self._environment_hash = hash_of(environment_key) if environment_key else None
        self._stored: list[StoredKey] = []
        self._local: Key | None = None
        self._read_at = -float("inf")
        self._failing = False
        self._reading: asyncio.Task[None] | None = None

    async def load(self) -> None:
        """Read the keys. Call it once before requests are served; it stores the keys with reserved names."""
        if self._environment_hash is not None:
            await self._storage.run(lambda store: store.keys.ensure(ENVIRONMENT, self._environment_hash))
        if self._loopback:
            self._local = await self._storage.run(lambda store: store.keys.ensure(LOCAL, None))
        self._stored, self._read_at = await self._read(), self._clock()

    async def is_open(self) -> bool:
        """Whether requests need no key. A revoked key counts: revoking the last one does not open the
        gateway."""
        await self.refresh()
        return not self.needed

    @property
    def needed(self) -> bool:
        """Whether requests need a key, as of the last `refresh`."""
        return self._local is None or bool(self._secret_keys())

    async def identify(self, authorization: str | None) -> Key:
        """Return the key of an Authorization header. Raises Problem 401 if it contains no key that is in
        use."""
        if await self.is_open():
            assert self._local is not None
            return self._local
        scheme, _, secret = (authorization or "").strip().partition(" ")
        if not secret.strip():
            raise unauthenticated("You did not pass an authentication token")
        stored = self.find(secret.strip()) if scheme.lower() in ("bearer", "token") else None
        if stored is None:
            raise unauthenticated("You did not pass a valid authentication token")
        return stored.key

    def by_id(self, key_id: int) -> Key | None:
        """Return a key, also after it was revoked. None if the database has no such key."""
        return next((stored.key for stored in self._stored if stored.key.id == key_id), None)

    @property
    def revoked(self) -> set[int]:
        """The ids of the revoked keys."""
        return {stored.key.id for stored in self._stored if stored.revoked_at is not None}

    def find(self, secret: str) -> StoredKey | None:
        """Return the key with this secret. None if no key that is in use has it."""
        hashed, found = hash_of(secret), None
        for stored in self.in_use():  # to the end, so that the time does not reveal which key matched
            if same(stored.hash or "", hashed):
                found = stored
        return found

    def in_use(self) -> list[StoredKey]:
        """Return the keys that clients can use, as they were at the last `refresh`."""
        return [stored for stored in self._secret_keys() if stored.revoked_at is None]

    def _secret_keys(self) -> list[StoredKey]:
        """The keys that clients can use, including revoked ones. Excludes the environment's key if that
        variable is no longer set."""
        return [
            stored
            for stored in self._stored
            if stored.hash is not None
            and (stored.key.name != ENVIRONMENT or stored.hash == self._environment_hash)
        ]

    async def refresh(self) -> None:
        """Read the keys again, at most once a second. If the database does not respond, a caller waits at
        most a second, and the last known keys are used."""
        if self._reading is None:
            if self._clock() - self._read_at < _SECONDS_FRESH:
                return
            self._read_at = self._clock()
            self._reading = asyncio.create_task(self._read_again())
        reading = self._reading
        await asyncio.wait({reading}, timeout=max(0.0, self._read_at + _PATIENCE - self._clock()))
        if reading.done():
            reading.result()
        else:
            self._report("the database does not respond")

    async def _read_again(self) -> None:
        try:
            self._stored = await self._read()
        except sqlite3.Error as error:
            self._report(str(error))
        else:
            self._failing = False
        finally:
            self._reading = None

    def _report(self, reason: str) -> None:
        """Log why the keys are not read, once until they are read again."""
        if not self._failing:
            logger.error("the keys cannot be read, so the last known ones are used: %s", reason)
        self._failing = True

    async def _read(self) -> list[StoredKey]:
        return await self._storage.run(lambda store: store.keys.all())


def unauthenticated(detail: str) -> Problem:
    return Problem(
        401,
        "Unauthenticated",
        detail,
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
