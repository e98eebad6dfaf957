"""The database in a thread of its own, so that the event loop never waits for the disk.

Makes sure that only one gateway uses the file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from llama.errors import BadSettings
from llama.gateway.storage.database import usable
from llama.gateway.storage.store import Store

T = TypeVar("T")


class Storage:
    """An open database. Calls run one after the other, in the order in which they were made."""

    def __init__(self, path: Path) -> None:
        """Raises BadSettings if another gateway uses the file, or if it cannot be opened."""
        self._lock = FileLock(f"{path}.lock", mode=0o600, thread_local=False)  # released in another thread
        with usable(path):
            try:
                self._lock.acquire(blocking=False)
            except Timeout as error:
                raise BadSettings(
                    f"another gateway uses the database {path}; stop it, or set LLAMA_GATEWAY_DATABASE to "
                    "another file"
                ) from error
        try:
            self._store = Store(path)  # after the lock: a newer gateway would change the tables
        except BaseException:
            self._lock.release()
            raise
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")

    async def run(self, function: Callable[[Store], T]) -> T:
        """Call a function with the store in the store's thread. Cancelling the caller does not undo it."""
        call = asyncio.get_running_loop().run_in_executor(self._thread, function, self._store)
        return await asyncio.shield(call)

    def close(self) -> None:
        """Finish the calls that were made, and close the file."""
        self._thread.shutdown()
        self._store.close()
        self._lock.release()
