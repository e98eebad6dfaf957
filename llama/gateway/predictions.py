"""All predictions of the gateway: creates, finds, lists and cancels them, and stores how they end.

This is what both APIs call. Knows nothing about HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llama.errors import GatewayRestarted
from llama.gateway.access.auth import Keys
from llama.gateway.access.budgets import Budgets
from llama.gateway.access.throttle import Throttle
from llama.gateway.dispatch.dispatcher import Dispatcher
from llama.gateway.dispatch.queue import FairQueue
from llama.gateway.prediction import Outcome, Prediction, PredictionRequest, Status
from llama.gateway.problems import not_stored
from llama.gateway.storage.storage import Storage

logger = logging.getLogger(__name__)

_PAGE = 100  # as many as Replicate returns
_CANCEL_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True)
class Page:
    """Some predictions, newest first. The cursors are texts for `Predictions.page`; None at either end."""

    predictions: list[Prediction]
    next: str | None
    previous: str | None


class Predictions:
    """Keeps the predictions that have not ended in memory, and all of them in the database."""

    def __init__(
        self,
        storage: Storage,
        keys: Keys,
        budgets: Budgets,
        queue: FairQueue,
        dispatcher: Dispatcher,
        on_begin: Callable[[Prediction], None],
        on_end: Callable[[Prediction, Outcome], None],
    ) -> None:
        """`on_begin` is called with every prediction that is queued for the first time, and `on_end` once for
        every one that has ended, before its readers see that."""
        self._storage, self._keys, self._throttle, self._budgets = storage, keys, Throttle(), budgets
        self._queue, self._dispatcher = queue, dispatcher
        self._on_begin, self._on_end = on_begin, on_end
        dispatcher.finish = self._finish
        dispatcher.on_sent = lambda prediction: self._mark(prediction, Status.PROCESSING)
        dispatcher.on_requeued = lambda prediction: self._mark(prediction, Status.STARTING)
        self._active = dict[str, Prediction]()
        """The predictions that have not ended, or whose end is not stored yet."""
        self._unsaved = dict[str, tuple[Prediction, Outcome]]()
        self._saved_counts = dict[str, object]()
        self._tasks = set[asyncio.Task[None]]()
        self.created = 0
        """How many predictions were created since the database was created."""

    @property
    def running(self) -> list[Prediction]:
        return self._dispatcher.running

    def unfinished(self) -> list[Prediction]:
        """The predictions whose end is not stored yet."""
        return list(self._active.values())

    async def create(self, requests: Sequence[PredictionRequest]) -> list[Prediction]:
        """Store predictions of one key and queue them, all or none.

        Raises Problem: 429 if the key has too many requests per minute or too many waiting predictions, 400
        if it could never create so many, 402 if its budget is used up, 503 if they cannot be stored.
        """
        key_id, count = requests[0].key_id, len(requests)
        key = self._keys.by_id(key_id)
        predictions = [Prediction(request) for request in requests]
        with self._queue.room_for(key_id, count):
            try:
                if key is not None:
                    await self._budgets.check(key, self.unfinished)
                    self._throttle.check(key, count)
                await self._storage.run(lambda store: store.insert(predictions))
            except sqlite3.Error as error:
                logger.error("predictions cannot be stored: %s", error)
                raise not_stored() from error
        self.created += count
        for prediction in predictions:
            self._begin(prediction)
        return predictions

    async def recover(self) -> None:
        """Queue the predictions that waited when the gateway ended, and fail those that ran."""
        unfinished = await self._storage.run(lambda store: store.unfinished())
        self.created = len(unfinished) + await self._storage.run(lambda store: store.usage.predictions())
        lost = GatewayRestarted("the gateway was restarted during the prediction; create it again")
        for prediction, progress_at in unfinished:
            if prediction.status is Status.STARTING and not prediction.request.needs_client:
                self._begin(prediction)
            else:
                self._active[prediction.id] = prediction
                # The time since then must not count as working time.
                ended_at = progress_at or prediction.started_at or prediction.created_at
                await self._finish(prediction, Outcome(Status.FAILED, str(lost), ended_at=ended_at))

    def _begin(self, prediction: Prediction) -> None:
        self._active[prediction.id] = prediction
        self._on_begin(prediction)
        self._dispatcher.add(prediction)

    async def cancel(self, prediction: Prediction) -> None:
        """Cancel a prediction, and return when it has ended. Does nothing if it has ended already."""
        await self._dispatcher.stop(prediction, Outcome(Status.CANCELED))
        await prediction.wait_until_ended(_CANCEL_TIMEOUT)

    async def _finish(self, prediction: Prediction, outcome: Outcome) -> None:
        """Store how a prediction ended, and then show it to its readers."""
        try:
            await self._store_end(prediction, outcome)
        except Exception as error:  # whatever it is, the readers must not wait for ever
            logger.error("the end of a prediction cannot be stored yet: %r", error)
            self._unsaved[prediction.id] = prediction, outcome
        else:
            self._active.pop(prediction.id, None)
        try:
            self._on_end(prediction, outcome)
        finally:
            prediction.end(outcome)

    async def _store_end(self, prediction: Prediction, outcome: Outcome) -> None:
        await self._storage.run(lambda store: store.finish(prediction, outcome))

    def _mark(self, prediction: Prediction, status: Status) -> None:
        """Store whether a prediction waits or runs, which decides what happens to it after a restart."""

        async def mark() -> None:
            try:
                await self._storage.run(lambda store: store.set_status(prediction.id, status))
            except sqlite3.Error as error:
                logger.error("the status of a prediction cannot be stored: %s", error)

        task = asyncio.create_task(mark())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def save(self) -> None:
        """Store the counts of running predictions that have changed, and the ends that could not be stored.
        Call it several times a second. Raises sqlite3.Error."""
        running = {p.id: p for p in self._dispatcher.running}
        counts = {i: (p.started_at, p.metrics.get("output_token_count")) for i, p in running.items()}
        changed = [p for i, p in running.items() if counts[i] != self._saved_counts.get(i)]
        if changed:
            await self._storage.run(lambda store: store.save_progress(changed))
        self._saved_counts = dict[str, object](counts)
        for prediction, outcome in list(self._unsaved.values()):
            await self._store_end(prediction, outcome)
            self._unsaved.pop(prediction.id, None)
            self._active.pop(prediction.id, None)

    async def find(self, key_id: int, prediction_id: str) -> Prediction | None:
        """Return a key's prediction; None if there is none with this id, or if it belongs to another key."""
        found = self._active.get(prediction_id) or await self._storage.run(
            lambda store: store.prediction(prediction_id)
        )
        return found if found is not None and found.request.key_id == key_id else None

    async def find_stream(self, stream_token: str) -> Prediction | None:
        """Return the prediction with this stream token, as long as its output is kept."""
        for prediction in self._active.values():
            if prediction.stream_token == stream_token:
                return prediction
        found = await self._storage.run(lambda store: store.prediction_of_stream(stream_token))
        return None if found is None or found.data_removed else found

    async def page(
        self,
        key_id: int,
        *,
        cursor: str | None = None,
        created_after: float | None = None,
        created_before: float | None = None,
    ) -> Page:
        """Return at most 100 of a key's predictions. Raises ValueError if the cursor is invalid."""
        direction, _, number = (cursor or "").partition("-")
        if cursor and direction not in ("before", "after"):
            raise ValueError("the cursor does not come from this gateway")
        position = {direction: int(number)} if cursor else {}
        found, more = await self._storage.run(
            lambda store: store.page(
                key_id,
                **position,
                created_after=created_after,
                created_before=created_before,
                limit=_PAGE,
            )
        )
        backwards = direction == "after"
        older = f"before-{found[-1][0]}" if found and (backwards or more) else None
        newer = f"after-{found[0][0]}" if found and (direction == "before" or (backwards and more)) else None
        return Page([self._active.get(p.id, p) for _, p in found], older, newer)
