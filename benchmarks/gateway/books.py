"""What the gateway's database says after clients and servers have left, and what must be true of it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fake_cog import Served

PIECES = tuple(f" word{number}" for number in range(12))
"""The whole answer to every request."""


def leaves(number: int) -> bool:
    """Whether the client of a request cancels it or drops its connection."""
    return number % 10 in (3, 7)


@dataclass(frozen=True)
class Books:
    """What the database says about all predictions, and what it has counted."""

    predictions: dict[int, dict[str, Any]]
    """The row of each request's prediction, by the number of the request."""
    rows: int
    counted: int
    """How many predictions the usage says there were."""
    counted_tokens: int

    @property
    def tokens(self) -> int:
        return sum(row["metrics"].get("output_token_count", 0) for row in self.predictions.values())

    def numbers(self, status: str) -> set[int]:
        return {number for number, row in self.predictions.items() if row["status"] == status}


def read_books(database: Path) -> Books:
    with closing(sqlite3.connect(database)) as connection:
        connection.row_factory = sqlite3.Row
        rows = [dict(row) for row in connection.execute("SELECT * FROM predictions")]
        counted, tokens = connection.execute(
            "SELECT COALESCE(SUM(predictions), 0), COALESCE(SUM(output_tokens), 0) FROM usage"
        ).fetchone()
    for row in rows:
        row["metrics"] = json.loads(row["metrics"])
        row["output"] = json.loads(row["output"] or "[]")
    return Books({number_of(row["inputs"]): row for row in rows}, len(rows), counted, tokens)


def number_of(inputs: str | Mapping[str, Any]) -> int:
    """The number of the request with these inputs."""
    text = inputs if isinstance(inputs, str) else json.dumps(inputs)
    return int(text.partition("request ")[2].split('"')[0])


def faults(books: Books, lost: Sequence[Served], total: int) -> list[str]:
    """What is wrong with the books; empty if every request ended once and was counted once.

    `lost`: what the killed server had accepted. Only a request whose pieces it had sent may have failed, also
    if it had sent all of them, because the last ones may not have arrived. If none had arrived, the other
    server may have completed the request.
    """
    rows = books.predictions.values()
    with_pieces = {number_of(served.inputs) for served in lost if served.pieces}
    leaving = {number for number in range(total) if leaves(number)}
    # A client that leaves can be gone before its request has arrived.
    missing = {n for n in range(total) if n % 10 != 7} - books.predictions.keys()
    failed = books.numbers("failed")
    whole = list(PIECES)
    checks = {
        f"these have no prediction: {missing}": missing,
        "a request has two predictions": books.rows != len(books.predictions),
        "a prediction has not ended": any(row["completed_at"] is None for row in rows),
        f"without pieces on the killed server, these failed: {failed - with_pieces}": failed - with_pieces,
        f"these were cancelled although no client asked for it: {books.numbers('canceled') - leaving}": (
            books.numbers("canceled") - leaving
        ),
        "an answer is not whole": any(
            row["status"] == "succeeded" and row["output"] != whole for row in rows
        ),
        "an answer has pieces of two servers": any(
            row["output"] != whole[: len(row["output"])] for row in rows
        ),
        f"{books.counted} predictions were counted, not {books.rows}": books.counted != books.rows,
        f"{books.counted_tokens} tokens were counted, not {books.tokens}": (
            books.counted_tokens != books.tokens
        ),
    }
    return [text for text, wrong in checks.items() if wrong]
