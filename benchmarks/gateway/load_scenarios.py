"""More requests than places, and servers and clients that leave: what must hold for all of them.

The benchmark runs these scenarios with many requests, the tests with fewer. The servers are fakes in this
process, so that their record of what they served can be compared with the gateway's.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.fake_cog import FakeCog, Script, Served
from benchmarks.gateway.apis import MODEL, Failed, Question, ask_openai, ask_replicate, client
from llama.gateway.storage.keys import hash_of
from llama.gateway.storage.store import Store

PIECES = tuple(f" word{number}" for number in range(12))


def add_keys(database: Path, names: Sequence[str]) -> None:
    """Add keys to a new database. Each key is its name followed by `-key`."""
    with closing(Store(database)) as store:
        for name in names:
            store.keys.add(name, hash_of(f"{name}-key"))


# More requests than places


async def wait_for_places(url: str, cog: FakeCog, per_key: Mapping[str, int]) -> list[str]:
    """Fill all places and queue the other requests, key by key, so that the keys have queues of different
    lengths. Then let all requests complete. Returns the names of the keys in the order in which their
    requests started on the server after the places were full."""
    cog.rules.script = Script(PIECES, hold_after=0)
    async with AsyncExitStack() as stack:
        clients = {name: await stack.enter_async_context(client(url, f"{name}-key")) for name in per_key}
        streams = list[asyncio.Task[str]]()
        for name, number in per_key.items():
            created = [await _create(clients[name], f"{name} {index}") for index in range(number)]
            streams += [asyncio.create_task(_text_of(clients[name], body)) for body in created]
        first = min(cog.rules.places, len(streams))
        while cog.counts.running < first:
            await asyncio.sleep(0.01)
        cog.rules.script = Script(PIECES, gap=0.005)
        cog.release()
        texts = await asyncio.gather(*streams)
    assert texts == ["".join(PIECES)] * len(texts), "an answer is not whole"
    return [str(served.inputs["prompt"]).split()[0] for served in cog.served[first:]]


def largest_lead(order: Sequence[str], waiting: Mapping[str, int]) -> int:
    """The largest difference between the started requests of two keys while both still had waiting ones.

    `waiting`: how many requests of each key were waiting at the beginning.
    """
    started, largest = Counter[str](), 0
    for name in order:
        started[name] += 1
        counts = [started[key] for key, number in waiting.items() if started[key] < number]
        if len(counts) > 1:
            largest = max(largest, max(counts) - min(counts))
    return largest


async def _create(gateway: httpx2.AsyncClient, prompt: str) -> dict[str, Any]:
    response = await gateway.post(f"/v1/models/{MODEL}/predictions", json={"input": {"prompt": prompt}})
    if not response.is_success:
        raise Failed(response.text)
    body: dict[str, Any] = response.json()
    return body


async def _text_of(gateway: httpx2.AsyncClient, prediction: Mapping[str, Any]) -> str:
    """Follow a prediction's stream to its end."""
    text = ""
    async with gateway.sse(prediction["urls"]["stream"]) as source:
        async for event in source:
            if event.event == "error":
                raise Failed(event.data)
            text += event.data if event.event == "output" else ""
    return text


# Clients and servers that leave


async def leave_and_kill(url: str, cogs: Sequence[FakeCog], names: Sequence[str], total: int) -> list[Served]:
    """Send `total` requests from several keys. A tenth is cancelled, a tenth is dropped, and the last server
    is killed when half of the requests have started. Returns what that server had accepted."""
    for cog in cogs:
        # Requests whose clients will leave take long, so that they do not end first.
        cog.rules.script = lambda inputs: Script(PIECES, gap=0.3 if _leaves(number_of(inputs)) else 0.01)
    at_once, lost = asyncio.Semaphore(200), list[Served]()

    async def kill() -> None:
        while sum(len(cog.served) for cog in cogs) < total // 2:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(cogs[-1].die)
        lost.extend(cogs[-1].served)

    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client(url, f"{name}-key")) for name in names]

        async def one(number: int) -> None:
            async with at_once:
                with suppress(Failed):
                    await _ask(clients[number % len(clients)], number)

        await asyncio.gather(kill(), *(one(number) for number in range(total)))
        await _wait_for_ends(clients)
    return lost


def _leaves(number: int) -> bool:
    """Whether the client of a request cancels it or drops its connection."""
    return number % 10 in (3, 7)


async def _ask(gateway: httpx2.AsyncClient, number: int) -> None:
    """Send one request, and end it as its number says."""
    prompt = f"request {number}"
    if number % 10 == 3:
        prediction = await _create(gateway, prompt)
        await asyncio.sleep(number % 4 * 0.04)
        response = await gateway.post(f"/v1/predictions/{prediction['id']}/cancel")
        assert response.is_success, response.text
    elif number % 10 == 7:
        chat = Question(prompt).chat()
        with suppress(TimeoutError):
            # Half of them leave when their answer begins, the others whether it has begun or not.
            async with (
                asyncio.timeout(None if number % 20 == 7 else 0.6),
                gateway.stream("POST", "/v1/chat/completions", json=chat) as response,
            ):
                assert response.is_success, response.status_code
    else:
        reading = await (ask_openai if number % 2 else ask_replicate)(gateway, Question(prompt))
        assert reading.text == "".join(PIECES), f"a client got {reading.text!r}"


async def _wait_for_ends(clients: Sequence[httpx2.AsyncClient]) -> None:
    """Wait until no prediction of these keys is left to run."""
    deadline = time.monotonic() + 60
    for gateway in clients:
        page = "/v1/predictions"
        while page:
            body = (await gateway.get(page)).json()
            if any(p["status"] in ("starting", "processing") for p in body["results"]):
                assert time.monotonic() < deadline, "a prediction did not end"
                await asyncio.sleep(0.1)
            else:
                page = body["next"]


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
    leaving = {number for number in range(total) if _leaves(number)}
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
