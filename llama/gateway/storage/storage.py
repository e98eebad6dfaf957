"""The database in a thread of its own, so that the event loop never waits for the disk.

Makes sure that only one gateway uses the file.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from filelock import FileLock, Timeout

from llama.errors import BadSettings
from llama.gateway.storage.database import usable
from llama.gateway.storage.store import Store

T = TypeVar("T")

_BUSY_TIMEOUT = 2.0  # seconds to wait for the command line; all other calls wait as well


class Storage:
    """An open database. Calls are carried out in the order in which they were made."""

    def __init__(self, path: Path) -> None:
        """Raises BadSettings if another gateway uses the file, or if it cannot be opened."""
        lock = f"{os.path.realpath(path)}.lock"  # the same one for a symbolic link to the file
        self._lock = FileLock(lock, mode=0o600, thread_local=False)  # released in another thread
        with usable(path):
            try:
                self._lock.acquire(blocking=False)
            except Timeout as error:
                raise BadSettings(
                    f"another gateway uses the database {path}; stop it, or set LLAMA_GATEWAY_DATABASE to "
                    "another file"
                ) from error
        try:
            # After the lock, because a newer gateway would change the tables.
            self._store = Store(path, _BUSY_TIMEOUT)
            with usable(path):
                self._store.check()
                self._file = path, path.stat().st_ino
        except BaseException:
            self._lock.release()
            raise
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._calls = list[_Call]()
        self._working: asyncio.Future[list[_Result]] | None = None

    @property
    def in_place(self) -> bool:
        """Whether the file is still there. What is written to a deleted file is lost."""
        path, number = self._file
        try:
            return path.stat().st_ino == number
        except OSError:
            return False

    async def run(self, function: Callable[[Store], T]) -> T:
        """Call a function with the store in the store's thread. Cancelling the caller does not cancel it.

        Calls that are made while the thread is busy are then carried out together, in one transaction. If one
        of them fails, the transaction is rolled back, and each function is called again on its own.
        """
        call = _Call(function, asyncio.get_running_loop().create_future())
        self._calls.append(call)
        if self._working is None:
            self._work()
        return cast("T", await asyncio.shield(call.future))

    def _work(self) -> None:
        """Let the thread carry out all calls that wait."""
        calls, self._calls = self._calls, []
        loop = asyncio.get_running_loop()
        self._working = loop.run_in_executor(self._thread, self._carry_out, calls)
        self._working.add_done_callback(functools.partial(self._deliver, calls))

    def _carry_out(self, calls: Sequence[_Call]) -> list[_Result]:
        if len(calls) > 1:
            with suppress(Exception), self._store.transaction():
                return [_Result(call.function(self._store)) for call in calls]
        return [_attempt(call, self._store) for call in calls]

    def _deliver(self, calls: Sequence[_Call], done: asyncio.Future[list[_Result]]) -> None:
        self._working = None
        if self._calls:
            self._work()
        for call, result in zip(calls, done.result(), strict=True):
            if call.future.cancelled():
                continue
            if result.error is None:
                call.future.set_result(result.value)
            else:
                call.future.set_exception(result.error)

    def close(self) -> None:
        """Finish the calls that were made, and close the file. Call it when nothing waits for a call."""
        self._thread.shutdown()
        self._store.close()
        self._lock.release()


@dataclass(frozen=True)
class _Call:
    function: Callable[[Store], Any]
    future: asyncio.Future[Any]


@dataclass(frozen=True)
class _Result:
    value: Any = None
    error: Exception | None = None


def _attempt(call: _Call, store: Store) -> _Result:
    try:
        return _Result(call.function(store))
    except Exception as error:
        return _Result(error=error)
