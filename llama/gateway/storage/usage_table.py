"""The table of usage: predictions, tokens and seconds by key, day (UTC) and model.

Its rows are kept when predictions are deleted and keys are revoked. SQLite adds them up, because many keys
in a year have more rows than a request should read. Knows nothing about prices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from typing import Any

from llama.gateway.prediction import Prediction, Tokens
from llama.gateway.storage.database import Database


class Column(StrEnum):
    """The columns by which usage can be grouped."""

    KEY = "key"
    """The key's name. Only one key of this name is in use, but revoked ones may have had it, too."""
    DAY = "day"
    MODEL = "model"


@dataclass(frozen=True)
class Usage:
    """The sum of the rows of one group."""

    of: tuple[str, ...]
    """The values of the columns by which the rows were grouped, such as a key's name and a day."""
    predictions: int
    input_tokens: int
    output_tokens: int
    seconds: float
    """How long servers worked on the predictions."""


_EXPRESSIONS = {Column.KEY: "keys.name", Column.DAY: "day", Column.MODEL: "model"}


class UsageTable:
    """The counts of all keys. A prediction is counted on the day on which it was created."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def add(self, prediction: Prediction, ended_at: float) -> None:
        """Count a prediction that has ended."""
        tokens = prediction.tokens
        seconds = max(0.0, ended_at - (prediction.started_at or ended_at))
        key_id, day, model = (
            prediction.request.key_id,
            prediction.day.isoformat(),
            prediction.request.model,
        )
        with self._db.transaction():
            self._db.execute(
                "INSERT INTO usage VALUES (?, ?, ?, 1, ?, ?, ?) "
                "ON CONFLICT (key_id, day, model) DO UPDATE SET predictions = predictions + 1, "
                "input_tokens = input_tokens + excluded.input_tokens, "
                "output_tokens = output_tokens + excluded.output_tokens, "
                "seconds = seconds + excluded.seconds",
                (key_id, day, model, tokens.input, tokens.output, seconds),
            )

    def sums(
        self, by: Sequence[Column], *, key_id: int | None = None, since: date | None = None
    ) -> list[Usage]:
        """Return a sum for each combination of values of the columns `by`, in the order of these values.

        `by` has at least one column. `key_id` limits the sums to one key, and `since` to this day and later.
        """
        columns = ", ".join(_EXPRESSIONS[column] for column in by)
        conditions: dict[str, Any] = {"key_id = ?": key_id, "day >= ?": since and since.isoformat()}
        used = {text: value for text, value in conditions.items() if value is not None}
        where = f"WHERE {' AND '.join(used)}" if used else ""
        found = self._db.execute(
            f"SELECT SUM(predictions), SUM(input_tokens), SUM(output_tokens), SUM(seconds), {columns} "
            f"FROM usage JOIN keys ON keys.id = key_id {where} GROUP BY {columns} ORDER BY {columns}",
            [*used.values()],
        )
        return [Usage(tuple(row[4:]), *row[:4]) for row in found]

    def tokens(self, key_id: int, since: date) -> Tokens:
        """Return the tokens of a key from a day on."""
        found = self._db.execute(
            "SELECT COALESCE(SUM(input_tokens), 0), COALESCE(SUM(output_tokens), 0) FROM usage "
            "WHERE key_id = ? AND day >= ?",
            (key_id, since.isoformat()),
        )
        return Tokens(*found.fetchone())

    def predictions(self) -> int:
        """Return the number of predictions of all time."""
        (count,) = self._db.execute("SELECT COALESCE(SUM(predictions), 0) FROM usage").fetchone()
        return int(count)
