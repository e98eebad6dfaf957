"""The predictions in memory and in the database, without HTTP."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from llama.gateway.dispatch.addresses import Addresses
from llama.gateway.dispatch.cog_client import CogClient
from llama.gateway.dispatch.dispatcher import Dispatcher
from llama.gateway.dispatch.queue import FairQueue
from llama.gateway.gateway import Gateway
from llama.gateway.metrics.recorder import Metrics
from llama.gateway.prediction import Outcome, Prediction, PredictionRequest, Status
from llama.gateway.predictions import Predictions
from llama.gateway.problems import Problem
from llama.gateway.settings import GatewaySettings
from llama.gateway.storage.store import Store
from llama.gateway.storage.usage_table import Column

REQUEST = PredictionRequest(1, {"prompt": "Hi"}, "owner/name")


def without_servers(path: Path) -> Gateway:
    return Gateway(GatewaySettings(database=path), Addresses(["http://127.0.0.1:1"]), grace=1)


def set_writable(store: Store, writable: bool) -> None:
    """Let SQLite refuse to write, as it does on a full disk."""
    store._db.execute(f"PRAGMA query_only = {int(not writable)}")


def test_a_full_disk_refuses_new_predictions_and_keeps_the_ends_of_others_until_it_has_room(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        gateway = without_servers(tmp_path / "gateway.sqlite3")
        predictions, storage = gateway.predictions, gateway.storage
        await gateway.keys.load()
        (waiting,) = await predictions.create([REQUEST])
        await storage.run(lambda store: set_writable(store, False))
        with pytest.raises(Problem) as refused:
            await predictions.create([REQUEST])
        assert refused.value.status == 503
        await predictions.cancel(waiting)
        assert waiting.status is Status.CANCELED
        found = await predictions.find(1, waiting.id)
        assert found is waiting
        with pytest.raises(sqlite3.OperationalError):
            await predictions.save()
        await storage.run(lambda store: set_writable(store, True))
        await predictions.save()
        stored = await storage.run(lambda store: store.prediction(waiting.id))
        assert stored is not None
        assert stored.status is Status.CANCELED
        assert await storage.run(lambda store: store.usage.predictions()) == 1
        storage.close()

    asyncio.run(scenario())


def test_a_restart_on_a_full_disk_shows_the_lost_predictions_as_failed_and_stores_that_later(
    tmp_path: Path,
) -> None:
    path = tmp_path / "gateway.sqlite3"

    async def scenario() -> None:
        first = without_servers(path)
        await first.keys.load()
        (lost,) = await first.predictions.create([REQUEST])
        await first.storage.run(lambda store: store.set_status(lost.id, Status.PROCESSING))
        first.storage.close()

        second = without_servers(path)
        await second.keys.load()
        await second.storage.run(lambda store: set_writable(store, False))
        await second.predictions.recover()
        found = await second.predictions.find(1, lost.id)
        assert found is not None
        assert found.status is Status.FAILED
        assert str(found.error).startswith("E4002 GatewayRestarted: ")
        await second.predictions.cancel(found)  # returns at once
        await second.storage.run(lambda store: set_writable(store, True))
        await second.predictions.save()
        stored = await second.storage.run(lambda store: store.prediction(lost.id))
        assert stored is not None
        assert stored.status is Status.FAILED
        second.storage.close()

    asyncio.run(scenario())


def test_the_waiting_predictions_of_connected_clients_fail_when_the_gateway_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        gateway = without_servers(tmp_path / "gateway.sqlite3")
        async with gateway.running():
            (detached,) = await gateway.predictions.create([REQUEST])
            (connected,) = await gateway.predictions.create(
                [PredictionRequest(1, {"prompt": "Hi"}, "owner/name", needs_client=True)]
            )
            gateway.stop_starting()
            assert await connected.wait_until_ended(10)
            assert str(connected.error).startswith("E4002 GatewayRestarted: ")
            assert detached.status is Status.STARTING  # it is queued again after the restart

    asyncio.run(scenario())


def test_the_time_while_the_gateway_is_down_does_not_count_as_work(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sqlite3"

    async def scenario() -> None:
        first = without_servers(path)
        await first.keys.load()
        (lost,) = await first.predictions.create([REQUEST])
        lost.start()
        await first.storage.run(lambda store: store.set_status(lost.id, Status.PROCESSING))
        await first.storage.run(lambda store: store.save_progress([lost]))
        first.storage.close()
        await asyncio.sleep(1.5)

        second = without_servers(path)
        await second.keys.load()
        await second.predictions.recover()
        (usage,) = await second.storage.run(lambda store: store.usage.sums([Column.KEY]))
        assert usage.predictions == 1
        assert usage.seconds < 1.0
        second.storage.close()

    asyncio.run(scenario())


def test_a_failure_to_report_an_end_does_not_keep_readers_waiting(tmp_path: Path) -> None:
    def report(prediction: Prediction, outcome: Outcome) -> None:
        raise OSError("the log cannot be written")

    async def scenario() -> None:
        gateway = without_servers(tmp_path / "gateway.sqlite3")
        await gateway.keys.load()
        queue = FairQueue(1)
        dispatcher = Dispatcher(CogClient(), gateway.servers, queue, lambda _: None, Metrics())
        predictions = Predictions(
            gateway.storage,
            gateway.keys,
            gateway.budgets,
            queue,
            dispatcher,
            on_begin=lambda _: None,
            on_end=report,
        )
        (waiting,) = await predictions.create([REQUEST])
        with pytest.raises(OSError, match="cannot be written"):
            await predictions.cancel(waiting)
        assert waiting.status is Status.CANCELED
        gateway.storage.close()

    asyncio.run(scenario())
