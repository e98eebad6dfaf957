"""More requests than places, and servers and clients that leave: what must hold for all of them.

The benchmark runs these scenarios with many requests, the tests with fewer. The servers are fakes in this
process, so that their record of what they served can be compared with the gateway's.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, closing, suppress
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.fake_cog import FakeCog, Script, Served
from benchmarks.gateway.apis import MODEL, Failed, Question, ask_openai, ask_replicate, client
from benchmarks.gateway.books import PIECES, leaves, number_of
from llama.gateway.storage.keys import hash_of
from llama.gateway.storage.store import Store


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
    is killed when half of the requests have started. Returns what that server had accepted.

    That server holds one answer in its middle, so that at least one is lost after it has begun.
    """
    held = list[int]()

    def script_of_killed(inputs: Mapping[str, Any]) -> Script:
        number = number_of(inputs)
        if not held and not leaves(number):
            held.append(number)
        return Script(PIECES, gap=_gap(number), hold_after=6 if number in held else None)

    for cog in cogs[:-1]:
        cog.rules.script = lambda inputs: Script(PIECES, gap=_gap(number_of(inputs)))
    cogs[-1].rules.script = script_of_killed
    at_once, lost = asyncio.Semaphore(200), list[Served]()

    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client(url, f"{name}-key")) for name in names]

        async def kill() -> None:
            while sum(len(cog.served) for cog in cogs) < total // 2:
                await asyncio.sleep(0.005)
            async with asyncio.timeout(60):
                while not (held and await _has_begun(clients[held[0] % len(clients)], held[0])):
                    await asyncio.sleep(0.005)
            await asyncio.to_thread(cogs[-1].die)
            lost.extend(cogs[-1].served)

        async def one(number: int) -> None:
            async with at_once:
                with suppress(Failed):
                    await _ask(clients[number % len(clients)], number)

        await asyncio.gather(kill(), *(one(number) for number in range(total)))
        await _wait_for_ends(clients)
    return lost


def _gap(number: int) -> float:
    """The seconds before every piece of a request's answer. Requests whose clients will leave take long, so
    that they do not end first."""
    return 0.3 if leaves(number) else 0.01


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


async def _has_begun(gateway: httpx2.AsyncClient, number: int) -> bool:
    """Whether a piece of a request's answer has arrived at the gateway."""
    return any([p["output"] async for p in _predictions(gateway) if number_of(p["input"]) == number])


async def _wait_for_ends(clients: Sequence[httpx2.AsyncClient]) -> None:
    """Wait until no prediction of these keys is left to run."""
    async with asyncio.timeout(60):
        for gateway in clients:
            while any([p["completed_at"] is None async for p in _predictions(gateway)]):
                await asyncio.sleep(0.1)


async def _predictions(gateway: httpx2.AsyncClient) -> AsyncIterator[dict[str, Any]]:
    """Yield all predictions of a key, the newest first."""
    page = "/v1/predictions"
    while page:
        body = (await gateway.get(page)).json()
        for prediction in body["results"]:
            yield prediction
        page = body["next"]
