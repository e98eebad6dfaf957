"""Format figures as Markdown tables. Knows nothing about what the figures mean, or about files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table without a newline at its end."""

    def lines() -> Iterator[str]:
        cells = list(head)
        yield "| " + " | ".join(cells) + " |"
        yield "|---" * len(cells) + "|"
        for row in rows:
            yield "| " + " | ".join(row) + " |"

    return "\n".join(lines())


def by_batch_table(by_batch: dict[str, Any], figure: Callable[[dict[str, Any]], str]) -> str:
    """Return a table with one row per engine and one column per number of requests.

    `by_batch` has the measurements by number of requests, then by engine. A cell is blank if it was not
    measured.
    """
    engines = list(dict.fromkeys(engine for rows in by_batch.values() for engine in rows))
    return table(
        ("engine", *(counted(batch, "request") for batch in by_batch)),
        (
            (engine, *(figure(rows[engine]) if engine in rows else "" for rows in by_batch.values()))
            for engine in engines
        ),
    )


def counted(number: int | str, noun: str) -> str:
    """Return "1 request", "8 requests", and so on."""
    return f"{number} {noun}{'' if int(number) == 1 else 's'}"


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f}"
