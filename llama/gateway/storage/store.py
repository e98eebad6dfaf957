"""The gateway's database: predictions, facts, and the tables of keys and usage.

All methods are synchronous: the gateway calls them in one thread (`storage/storage.py`), and the command line
calls them directly. Every method that writes is one transaction. Knows nothing about HTTP or servers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from llama.gateway.prediction import Outcome, Prediction, Status
from llama.gateway.storage.database import Database
from llama.gateway.storage.key_table import KeyTable
from llama.gateway.storage.rows import insert_values, metrics_values, prediction_of
from llama.gateway.storage.usage_table import UsageTable

_PAGE_SIZE = 4_000_000
"""A page of predictions ends after so many characters."""
_ROWS_KEPT = 30 * 24 * 3600
"""Seconds after which the row of a finished prediction is deleted. Its counts stay."""


class Store:
    """An open database. Raises sqlite3.Error if the file cannot be read or written."""

    def __init__(self, path: Path, busy_timeout: float = 10.0) -> None:
        """Open or create the file. Raises BadSettings if it cannot be the database of a gateway."""
        self._db = Database(path, busy_timeout)
        self.keys = KeyTable(self._db)
        self.usage = UsageTable(self._db)
        self._texts_in_log = True
        """Whether the write-ahead log may contain deleted texts."""

    def transaction(self) -> AbstractContextManager[None]:
        """All calls of the block are carried out, or none."""
        return self._db.transaction()

    def check(self) -> None:
        """Read what the start of a gateway needs. Raises sqlite3.Error if the file is damaged."""
        self.keys.all()
        self.usage.predictions()
        self.unfinished()

    def close(self) -> None:
        self._db.close()

    def insert(self, predictions: Sequence[Prediction]) -> None:
        """Add predictions that have not started, all or none."""
        with self._db.transaction():
            for values in map(insert_values, predictions):
                marks = ", ".join("?" * len(values))
                self._db.execute(
                    f"INSERT INTO predictions ({', '.join(values)}) VALUES ({marks})", [*values.values()]
                )

    def set_status(self, prediction_id: str, status: Status) -> None:
        """Note whether a prediction waits, in which case it is queued again after a restart, or runs."""
        with self._db.transaction():
            self._db.execute(
                "UPDATE predictions SET status = ? WHERE id = ? AND completed_at IS NULL",
                (status, prediction_id),
            )

    def save_progress(self, predictions: Sequence[Prediction]) -> None:
        """Save the counts of running predictions, so that they are not lost if the gateway is killed."""
        with self._db.transaction():
            self._db.executemany(
                "UPDATE predictions SET started_at = ?, progress_at = ?, metrics = ? "
                "WHERE id = ? AND completed_at IS NULL",
                [(p.started_at, time.time(), metrics_values(p), p.id) for p in predictions],
            )

    def finish(self, prediction: Prediction, outcome: Outcome) -> None:
        """Store how a prediction ended, and count it. A second call for the same prediction does nothing."""
        logs = prediction.logs if outcome.logs is None else outcome.logs
        with self._db.transaction():
            ended = self._db.execute(
                "UPDATE predictions SET status = ?, started_at = ?, completed_at = ?, output = ?, logs = ?, "
                "error = ?, metrics = ? WHERE id = ? AND completed_at IS NULL",
                (
                    outcome.status,
                    prediction.started_at,
                    outcome.ended_at,
                    json.dumps(prediction.pieces),
                    logs,
                    outcome.error,
                    metrics_values(prediction),
                    prediction.id,
                ),
            ).rowcount
            if ended:
                self.usage.add(prediction, outcome.ended_at)

    def prediction(self, prediction_id: str) -> Prediction | None:
        return self._one("id", prediction_id)

    def prediction_of_stream(self, stream_token: str) -> Prediction | None:
        return self._one("stream_token", stream_token)

    def _one(self, column: str, value: str) -> Prediction | None:
        row = self._db.execute(f"SELECT * FROM predictions WHERE {column} = ?", (value,)).fetchone()
        return prediction_of(row) if row else None

    def page(
        self,
        key_id: int,
        *,
        before: int | None = None,
        after: int | None = None,
        created_after: float | None = None,
        created_before: float | None = None,
        limit: int,
    ) -> tuple[list[tuple[int, Prediction]], bool]:
        """Return a key's predictions with their sequence numbers, newest first: the newest below `before`, or
        the oldest above `after`. Also returns whether there are more.

        There are at most `limit`, and fewer if their texts are long.
        """
        conditions: dict[str, Any] = {
            "key_id = ?": key_id,
            "sequence < ?": before,
            "sequence > ?": after,
            "created_at >= ?": created_after,
            "created_at < ?": created_before,
        }
        used = {text: value for text, value in conditions.items() if value is not None}
        order = "ASC" if after is not None else "DESC"
        rows = self._db.execute(
            f"SELECT * FROM predictions WHERE {' AND '.join(used)} ORDER BY sequence {order}",
            [*used.values()],
        )
        found, size = list[tuple[int, Prediction]](), 0
        for row in rows:
            if len(found) == limit or size > _PAGE_SIZE:
                return sorted(found, key=_newest_first), True
            found.append((row["sequence"], prediction_of(row)))
            size += len(row["inputs"] or "") + len(row["output"] or "") + len(row["logs"] or "")
        return sorted(found, key=_newest_first), False

    def unfinished(self) -> list[tuple[Prediction, float | None]]:
        """Return the predictions that had not ended when the gateway ended, the oldest first, and when the
        progress of each was last saved."""
        rows = self._db.execute("SELECT * FROM predictions WHERE completed_at IS NULL ORDER BY sequence")
        return [(prediction_of(row), row["progress_at"]) for row in rows.fetchall()]

    def undelivered(self) -> list[Prediction]:
        """Return the ended predictions whose `completed` webhook has not been delivered, the oldest first."""
        rows = self._db.execute(
            "SELECT * FROM predictions WHERE webhook_due = 1 AND completed_at IS NOT NULL "
            "AND inputs IS NOT NULL ORDER BY sequence"
        )
        return [prediction_of(row) for row in rows.fetchall()]

    def webhook_delivered(self, prediction_id: str) -> None:
        """Note that the `completed` webhook was delivered, or that it was given up."""
        with self._db.transaction():
            self._db.execute("UPDATE predictions SET webhook_due = 0 WHERE id = ?", (prediction_id,))

    def remove_data(self, ended_before: float) -> int:
        """Delete the texts of predictions that ended before this time. Returns the number of predictions."""
        with self._db.transaction():
            removed = self._db.execute(
                "UPDATE predictions SET inputs = NULL, output = NULL, logs = NULL "
                "WHERE completed_at < ? AND inputs IS NOT NULL",
                (ended_before,),
            ).rowcount
            self._db.execute("DELETE FROM predictions WHERE completed_at < ?", (time.time() - _ROWS_KEPT,))
        self._texts_in_log = self._texts_in_log or removed > 0
        if self._texts_in_log:
            self._texts_in_log = not self._db.truncate_log()
        return removed

    # Facts about the model, which outlive the servers

    def fact(self, name: str) -> str | None:
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return row["value"] if row else None

    def set_fact(self, name: str, value: str) -> None:
        with self._db.transaction():
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))


def _newest_first(item: tuple[int, Prediction]) -> int:
    return -item[0]
