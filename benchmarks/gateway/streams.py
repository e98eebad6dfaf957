"""Many streams at once, directly and through gateways: their speed, their first piece, and the CPU time.

Within a round, every way to the server is measured once, so that a slow phase of the machine affects all of
them.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import Any

import httpx2

from benchmarks.gateway.apis import Ask, Question, Reading
from benchmarks.gateway.processes import Process

Row = dict[str, Any]
_numbers = count(1)


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Way:
    """One way to a server."""

    name: str
    ask: Ask
    client: httpx2.AsyncClient
    process: Process | None = None
    """The gateway, whose CPU time is measured."""


def question(tokens: int | None = None) -> Question:
    """A question that was not asked before."""
    return Question(f"Question {next(_numbers)}: what does a llama eat, and why?", tokens)


async def compare(
    ways: Sequence[Way],
    *,
    streams: int,
    rounds: int,
    pieces: Callable[[Reading], int],
    tokens: int | None = None,
    apart: float = 0,
    title: str,
) -> dict[str, Row]:
    """Measure all ways in every round, in reverse order in every other round. Returns medians by way.

    `pieces` counts the pieces, or the tokens, of an answer. The streams begin `apart` seconds apart.
    """
    rows: dict[str, list[Row]] = {way.name: [] for way in ways}
    for number in range(rounds + 1):
        for way in ways[:: 1 if number % 2 else -1]:
            row = await _measure(way, [question(tokens) for _ in range(streams)], pieces, apart)
            if number:  # the first round warms up
                rows[way.name].append(row)
                log(f"{title}, round {number}: {way.name} {row['per_second']:.1f}/s")
    return {name: _medians(turns) for name, turns in rows.items()}


async def _measure(
    way: Way, questions: Sequence[Question], pieces: Callable[[Reading], int], apart: float
) -> Row:
    async def ask(number: int, question: Question) -> Reading:
        await asyncio.sleep(number * apart)
        reading: Reading = await way.ask(way.client, question)
        return reading

    before = way.process.cpu_seconds if way.process else 0.0
    readings = await asyncio.gather(*(ask(number, question) for number, question in enumerate(questions)))
    total = sum(pieces(reading) for reading in readings)
    seconds = max(r.ended for r in readings) - min(r.asked for r in readings)
    row: Row = {
        "pieces": total,
        "per_second": total / seconds,
        "first": median(r.first - r.asked for r in readings),
    }
    if way.process:
        row["cpu_per_piece"] = (way.process.cpu_seconds - before) / total
        row["memory"] = way.process.memory
    return row


def _medians(turns: Sequence[Row]) -> Row:
    speeds = [turn["per_second"] for turn in turns]
    return {
        **{name: median(turn[name] for turn in turns) for name in turns[0]},
        "slowest": min(speeds),
        "fastest": max(speeds),
        "rounds": len(turns),
    }
