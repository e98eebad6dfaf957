"""An SQLite file: how it is opened, and how a transaction is made. Knows no table."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from llama.errors import BadSettings
from llama.gateway.storage.migrations import migrate

_OPENING_TIMEOUT = 10  # seconds


class Database:
    """An open file. Its methods raise sqlite3.Error if it cannot be read or written."""

    def __init__(self, path: Path, busy_timeout: float) -> None:
        """Open or create the file, which only its owner can read. A transaction waits up to `busy_timeout`
        seconds for that of another process.

        Raises BadSettings if the file cannot be opened, or if it is not a gateway's database.
        """
        # SQLite does not wait for another process that creates the tables at the same time.
        with usable(path), FileLock(f"{path}.opening", timeout=_OPENING_TIMEOUT, mode=0o600):
            self._connection = _open(path, busy_timeout)

    def execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Run a statement that reads, or one inside a transaction."""
        return self._connection.execute(statement, values)

    def executemany(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        self._connection.executemany(statement, rows)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All statements of the block are carried out, or none. Inside another transaction, they
        become a part of it."""
        if self._connection.in_transaction:
            yield
            return
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # a full disk can end it
                self.execute("ROLLBACK")
            raise

    def truncate_log(self) -> bool:
        """Move the write-ahead log, which contains deleted texts, into the file. Returns False if another
        process reads the log at the moment."""
        busy, _, _ = self.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy

    def close(self) -> None:
        self._connection.close()


@contextmanager
def usable(path: Path) -> Iterator[None]:
    """Create a missing file and its folder. Raises BadSettings if that or the block fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        yield
    except (OSError, sqlite3.Error) as error:
        raise BadSettings(
            f"the database {path} cannot be opened ({error}); use it as the user to whom it belongs, or set "
            "LLAMA_GATEWAY_DATABASE to a file that can be written"
        ) from error


def _open(path: Path, busy_timeout: float) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=busy_timeout, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    # NORMAL: a killed process loses nothing. A power failure can lose the last transactions.
    for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "secure_delete = ON"):
        connection.execute(f"PRAGMA {pragma}")
    migrate(connection)
    return connection
