"""Sends a prediction's webhooks. Those for `start`, `output` and `logs` are sent once each; `completed` is
retried up to six times.

Knows when to send what. Knows nothing about signatures, addresses or what a body contains.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from llama.gateway.prediction import Prediction
from llama.gateway.webhooks.delivery import Delivery

logger = logging.getLogger(__name__)

_RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_GIVE_UP_AFTER = 600.0  # seconds
_MOST_WAITING = 5000


class Webhooks:
    """Follows predictions, each in a task of its own, so that a slow receiver delays nothing else."""

    def __init__(
        self,
        delivery: Delivery,
        view: Callable[[Prediction], dict[str, Any]],
        delivered: Callable[[str], Awaitable[None]],
        *,
        interval: float = 0.5,
        retry_delays: Sequence[float] = _RETRY_DELAYS,
        give_up_after: float = _GIVE_UP_AFTER,
        most_waiting: int = _MOST_WAITING,
    ) -> None:
        """`view` returns the body of a webhook. `delivered` is called with the id of a prediction whose
        `completed` was accepted or given up. `interval`: seconds between two webhooks for output and logs.
        `retry_delays`: seconds before each further attempt to deliver `completed`. `give_up_after`: seconds
        after which there is no further attempt, because too many webhooks of the key wait before it.
        `most_waiting`: how many ended predictions of a key may wait for the delivery of `completed`."""
        self._delivery, self._view, self._delivered = delivery, view, delivered
        self._interval, self._retry_delays = interval, retry_delays
        self._give_up_after, self._most_waiting = give_up_after, most_waiting
        self._waiting = Counter[int]()
        """By key id: how many ended predictions wait for the delivery of `completed`."""
        self._closing = asyncio.Event()
        self._tasks: dict[asyncio.Task[None], Prediction] = {}

    def follow(self, prediction: Prediction) -> None:
        """Send the webhooks of a prediction from now on. Does nothing if it has no webhook."""
        if prediction.request.webhook is not None:
            self._start(prediction, self._follow(prediction, prediction.request.webhook.events))

    def deliver_completed(self, prediction: Prediction) -> None:
        """Send `completed` for a prediction that ended before the gateway was restarted."""
        if prediction.request.webhook is not None:
            self._start(prediction, self._complete(prediction))

    async def close(self, grace: float = 5.0) -> None:
        """Give the running attempts `grace` seconds, and make no further ones. `delivered` is not called for
        what was not delivered, so that it can be delivered after a restart."""
        self._closing.set()
        tasks = dict(self._tasks)
        for task, prediction in tasks.items():
            if not prediction.status.ended:
                task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=grace)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, prediction: Prediction, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks[task] = prediction
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        prediction = self._tasks.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the webhook of prediction %s failed", prediction.id, exc_info=error)

    async def _follow(self, prediction: Prediction, events: frozenset[str]) -> None:
        unsent, number = _Unsent(prediction, events), 0
        while not prediction.status.ended or unsent.any():
            if not unsent.any():
                await prediction.changed()
                continue
            number += 1
            paced = unsent.output_or_logs()
            await self._send_once(prediction, unsent, f"msg_{prediction.id}_{number}")
            if paced:
                await prediction.wait_until_ended(self._interval)
        if "completed" in events:
            await self._complete(prediction)

    async def _send_once(self, prediction: Prediction, unsent: _Unsent, message_id: str) -> None:
        async with self._delivery.slot(prediction):
            if unsent.any():  # still, after the wait for a slot
                unsent.clear()
                await self._delivery.attempt(prediction, message_id, self._body(prediction))

    async def _complete(self, prediction: Prediction) -> None:
        key_id = prediction.request.key_id
        settled: bool | None = False
        if self._waiting[key_id] < self._most_waiting:
            self._waiting[key_id] += 1
            try:
                async with asyncio.timeout(self._give_up_after):
                    settled = await self._attempt_until_settled(prediction)
            except TimeoutError:
                pass
            finally:
                self._waiting[key_id] -= 1
        if settled is None:
            return
        if not settled:
            logger.warning("the completed webhook of prediction %s was given up", prediction.id)
        await self._delivered(prediction.id)

    async def _attempt_until_settled(self, prediction: Prediction) -> bool | None:
        """Returns False if the last attempt failed, and None if the gateway ended before it."""
        # The id is the same after a restart, so that a receiver can recognize what it has handled.
        message_id = f"msg_{prediction.id}_completed"
        for delay in (0.0, *self._retry_delays):
            if delay and await self._closes_within(delay):
                return None
            async with self._delivery.slot(prediction):
                if await self._delivery.attempt(prediction, message_id, self._body(prediction)):
                    return True
        return False

    async def _closes_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)
        return self._closing.is_set()

    def _body(self, prediction: Prediction) -> bytes:
        return json.dumps(self._view(prediction)).encode()


class _Unsent:
    """What has happened to a prediction since its webhook was last sent. A body has no event name and
    contains the whole prediction, so one webhook can stand for several events."""

    def __init__(self, prediction: Prediction, events: frozenset[str]) -> None:
        self._prediction, self._events = prediction, events
        self._started, self._pieces, self._logs = False, 0, 0

    def any(self) -> bool:
        start = "start" in self._events and not self._started and self._prediction.started_at is not None
        return not self._completed_tells_it() and (start or self.output_or_logs())

    def output_or_logs(self) -> bool:
        output = "output" in self._events and len(self._prediction.pieces) > self._pieces
        logs = "logs" in self._events and len(self._prediction.logs) > self._logs
        return not self._completed_tells_it() and (output or logs)

    def clear(self) -> None:
        self._started = self._prediction.started_at is not None
        self._pieces, self._logs = len(self._prediction.pieces), len(self._prediction.logs)

    def _completed_tells_it(self) -> bool:
        return self._prediction.status.ended and "completed" in self._events
