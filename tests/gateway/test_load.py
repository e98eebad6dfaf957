"""More requests than places, and clients and servers that leave: every request ends once and is counted once.

`make bench-gateway` runs the same scenarios with more requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from gateways import MODEL, Gateway
from server_clients import until

from benchmarks.fake_cog import FakeCog, Script
from benchmarks.gateway import load_scenarios
from benchmarks.gateway.books import faults, read_books
from llama.gateway.prediction import PredictionRequest, Status

KEYS = {"first": 60, "second": 40, "third": 20}


def test_waiting_requests_are_all_answered_and_the_keys_take_turns(
    gateways: Callable[..., Gateway], tmp_path: Path
) -> None:
    database, places = tmp_path / "keys.sqlite3", 8
    load_scenarios.add_keys(database, list(KEYS))
    with FakeCog(places=places) as cog:
        gateway = gateways(cog.url, database=database, places=places)
        order = asyncio.run(load_scenarios.wait_for_places(gateway.url, cog, KEYS))
        assert len(order) == sum(KEYS.values()) - places
        assert cog.counts.most_running == places
        # Requests that start at the same time may arrive in any order.
        assert load_scenarios.largest_lead(order, {**KEYS, "first": KEYS["first"] - places}) <= places
        assert {request.path for request in cog.received} == {
            "/health-check",
            "/openapi.json",
            "/predictions",
        }


def test_every_request_ends_once_and_is_counted_once_if_clients_and_a_server_leave(
    gateways: Callable[..., Gateway], tmp_path: Path
) -> None:
    database, total = tmp_path / "keys.sqlite3", 300
    load_scenarios.add_keys(database, ["first", "second"])
    with FakeCog() as cog, FakeCog() as killed:
        gateway = gateways(cog.url, killed.url, database=database)
        lost = asyncio.run(
            load_scenarios.leave_and_kill(gateway.url, [cog, killed], ["first", "second"], total)
        )
    books = read_books(database)
    assert faults(books, lost, total) == []
    assert books.numbers("succeeded")
    assert books.numbers("canceled")
    assert books.numbers("failed")


def test_a_prediction_that_is_cancelled_at_any_moment_ends_and_frees_its_place(
    cog: FakeCog, gateway: Gateway
) -> None:
    predictions, cog.rules.script = gateway.inside.predictions, Script(gap=0.001)

    async def cancel_after(turns: int) -> None:
        (prediction,) = await predictions.create([PredictionRequest(1, {"prompt": "Hello"}, MODEL)])
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(30):  # not `wait_for`, which would begin a turn later
            await predictions.cancel(prediction)
        assert prediction.status in (Status.CANCELED, Status.SUCCEEDED)

    async def cancel_all() -> None:
        await asyncio.gather(*(cancel_after(turns) for turns in range(40)))

    gateway.run(cancel_all())
    until(lambda: cog.counts.running == 0)
    assert [server.in_flight for server in gateway.inside.servers.all] == [0]


def test_the_lead_of_a_key_is_what_it_started_more_than_a_key_that_still_waits() -> None:
    waiting = {"a": 4, "b": 2, "c": 2}
    assert load_scenarios.largest_lead(["a", "b", "c", "a", "b", "c", "a", "a"], waiting) == 1
    assert load_scenarios.largest_lead(["a", "a", "a", "a", "b", "c", "b", "c"], waiting) == 3
