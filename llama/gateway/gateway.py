"""Puts the parts of a gateway together, and starts and ends them in order."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

from llama.gateway.access.auth import Keys
from llama.gateway.access.budgets import Budgets
from llama.gateway.access.sessions import Sessions
from llama.gateway.dispatch.addresses import Addresses
from llama.gateway.dispatch.cog_client import CogClient
from llama.gateway.dispatch.dispatcher import Dispatcher
from llama.gateway.dispatch.queue import FairQueue
from llama.gateway.dispatch.servers import Servers
from llama.gateway.early_ends import EarlyEnds
from llama.gateway.logs import log_end
from llama.gateway.metrics.recorder import Metrics
from llama.gateway.metrics.state import State
from llama.gateway.model_card import check_schema
from llama.gateway.prediction import Outcome, Prediction
from llama.gateway.predictions import Predictions
from llama.gateway.repeat import repeat
from llama.gateway.replicate.view import prediction_body
from llama.gateway.settings import GatewaySettings
from llama.gateway.storage.database import usable
from llama.gateway.storage.secret_file import secret_beside
from llama.gateway.storage.storage import Storage
from llama.gateway.webhooks.delivery import Delivery
from llama.gateway.webhooks.outgoing import Outgoing
from llama.gateway.webhooks.webhooks import Webhooks
from llama.settings import expanded

logger = logging.getLogger(__name__)

_OFTEN = 0.25  # seconds
_SAVE_AGAIN_AFTER = 1.0  # seconds, when the disk is full
_LAST_WEBHOOKS = 5.0  # seconds
_FIRST_CHECKS = 0.5  # seconds
_SCHEMA = "openapi_schema"


class Gateway:
    """All parts of one gateway. `running` starts and ends the background work."""

    def __init__(
        self,
        settings: GatewaySettings,
        addresses: Addresses,
        *,
        loopback: bool = True,
        grace: float,
        ping_interval: float = 10.0,
        lost_after: float = 30.0,
    ) -> None:
        """`loopback`: the gateway can be reached from this machine only. `grace`: how many seconds running
        predictions have to end when the gateway ends. `ping_interval`: seconds between two comments on a
        silent stream. `lost_after`: a server that has not responded for this many seconds is lost.

        Raises BadSettings if the database cannot be opened.
        """
        self.settings, self.ping_interval = settings, ping_interval
        self._grace = grace
        database = expanded(settings.database, "LLAMA_GATEWAY_DATABASE")
        self.storage = Storage(database)
        key = settings.key.get_secret_value() if settings.key else None
        self.keys = Keys(self.storage, environment_key=key, loopback=loopback)
        with usable(database):
            self.sessions = Sessions(secret_beside(database), self.keys)
        self._client = CogClient()
        self.servers = Servers(self._client, addresses, settings.places, lost_after=lost_after)
        delivery = Delivery(Outgoing(settings.webhook_networks), self.keys.by_id)
        self.webhooks = Webhooks(delivery, prediction_body, self._webhook_delivered)
        self.budgets = Budgets(self.storage, settings.prices)
        queue = FairQueue(settings.queue)
        self.metrics = Metrics()
        dispatcher = Dispatcher(self._client, self.servers, queue, self._at_once, self.metrics)
        self.predictions = Predictions(
            self.storage,
            self.keys,
            self.budgets,
            queue,
            dispatcher,
            on_begin=self.webhooks.follow,
            on_end=self._prediction_ended,
        )
        self.metrics.registry.register(
            State(settings.model, queue, self.servers, lambda: len(dispatcher.running))
        )
        self._early_ends = EarlyEnds(
            self.predictions.unfinished,
            dispatcher,
            self.keys,
            self.budgets,
            queue_timeout=settings.queue_timeout,
        )
        self._dispatcher = dispatcher
        self._stop_requested = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None

    def _at_once(self, key_id: int) -> int | None:
        key = self.keys.by_id(key_id)
        return key.limits.at_once if key else None

    def _prediction_ended(self, prediction: Prediction, outcome: Outcome) -> None:
        self.metrics.ended(prediction, outcome)
        key = self.keys.by_id(prediction.request.key_id)
        log_end(prediction, outcome, key.name if key else None)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Resume what an earlier run left in the database, and serve until the block ends."""
        await self.keys.load()
        await self._remember_schema()
        await self.predictions.recover()
        for prediction in await self.storage.run(lambda store: store.undelivered()):
            self.webhooks.deliver_completed(prediction)
        background = (
            self.servers.watch(),
            repeat(self._early_ends.end_overdue, _OFTEN),
            repeat(self._save, _OFTEN),
            repeat(self._delete_old_texts, min(60.0, self.settings.retention / 2)),
        )
        async with self._client:
            tasks = [asyncio.create_task(work) for work in background]
            try:
                await self._wait_for_a_server()
                yield
            finally:
                self.stop_starting()
                await cast("asyncio.Task[None]", self._ending)
                await self.webhooks.close(0 if self._stop_requested.is_set() else _LAST_WEBHOOKS)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._save()
                self.storage.close()

    def stop_starting(self) -> None:
        """Start no more predictions, because the gateway has to end: the running ones have the grace period,
        and the waiting ones stay in the database. Call it in the event loop."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end_predictions())

    def stop_now(self) -> None:
        """End the grace period. Call it in the event loop, after `stop_starting`."""
        self._stop_requested.set()

    async def _end_predictions(self) -> None:
        self._dispatcher.stop_starting()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._grace):
                await self._dispatcher.idle(self._stop_requested)
        await self._dispatcher.end()
        await self._early_ends.end_waiting_connections()  # of those that still wait

    async def _wait_for_a_server(self) -> None:
        """Wait briefly for the first health checks, so that a gateway is usually ready when it listens."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_CHECKS):
                while not self.servers.any_ready:
                    await asyncio.sleep(0.01)

    async def _webhook_delivered(self, prediction_id: str) -> None:
        try:
            await self.storage.run(lambda store: store.webhook_delivered(prediction_id))
        except sqlite3.Error as error:
            logger.error(
                "a webhook will be sent again after a restart, because its state was not stored: %s", error
            )

    async def _remember_schema(self) -> None:
        """Load the schema of an earlier run, so that the catalog works before a server is ready."""
        known = await self.storage.run(lambda store: store.fact(_SCHEMA))
        if known:
            with suppress(ValueError):  # stored by a version that accepted it
                schema = json.loads(known)
                check_schema(schema)
                self.servers.schema = schema
        self.servers.on_schema = self._store_schema

    async def _store_schema(self, schema: dict[str, Any]) -> None:
        text = json.dumps(schema)
        try:
            await self.storage.run(lambda store: store.set_fact(_SCHEMA, text))
        except sqlite3.Error as error:
            logger.error("the model's schema cannot be stored: %s", error)

    async def _save(self) -> None:
        try:
            await self.predictions.save()
        except sqlite3.Error as error:
            logger.error("the state of predictions cannot be stored: %s", error)
            await asyncio.sleep(_SAVE_AGAIN_AFTER)

    async def _delete_old_texts(self) -> None:
        before = time.time() - self.settings.retention
        try:
            await self.storage.run(lambda store: store.remove_data(before))
        except sqlite3.Error as error:
            logger.error("old inputs and outputs cannot be deleted: %s", error)
