"""Ends predictions that must not go on: overdue ones, those of revoked keys or of keys without budget, and
those whose client is disconnected when the gateway stops.

Knows the reasons. Knows nothing about how an end is stored.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable

from llama.errors import BudgetUsedUp, GatewayRestarted, NotStarted
from llama.gateway.access.auth import Keys
from llama.gateway.access.budgets import Budgets, has_budget
from llama.gateway.dispatch.dispatcher import Dispatcher
from llama.gateway.prediction import Outcome, Prediction, Status

logger = logging.getLogger(__name__)


class EarlyEnds:
    """Checks the predictions that have not ended."""

    def __init__(
        self,
        unfinished: Callable[[], list[Prediction]],
        dispatcher: Dispatcher,
        keys: Keys,
        budgets: Budgets,
        *,
        queue_timeout: float,
    ) -> None:
        """`queue_timeout`: a prediction that has waited for so many seconds fails."""
        self._unfinished, self._dispatcher = unfinished, dispatcher
        self._keys, self._budgets = keys, budgets
        self._queue_timeout = queue_timeout

    async def end_overdue(self) -> None:
        """End the predictions that are past their deadline or have waited too long, those of revoked keys,
        and the waiting ones of keys whose budget is used up. Call it several times a second.

        While the gateway ends, also does what `end_waiting_connections` does: a prediction can still be
        created then, or go back to the queue."""
        if self._dispatcher.stopping:
            await self.end_waiting_connections()
        await self._keys.refresh()
        excesses = await self._excesses()
        revoked = self._keys.revoked
        for prediction in self._unfinished():
            if prediction.status.ended:
                continue
            # Not looked up before the loop: a server may take a prediction while others are being ended.
            key_id, waits = prediction.request.key_id, not self._dispatcher.is_running(prediction)
            if _is_late(prediction) or key_id in revoked:
                await self._dispatcher.stop(prediction, Outcome(Status.CANCELED))
            elif waits and (excess := excesses.get(key_id)):
                await self._fail(
                    prediction, BudgetUsedUp(f"the monthly budget of this key is used up: {excess}")
                )
            elif waits and prediction.age >= self._queue_timeout:
                late = f"no server was free within {self._queue_timeout:.0f} s; try again later"
                await self._fail(prediction, NotStarted(late))

    async def end_waiting_connections(self) -> None:
        """End the requests that wait for predictions in the queue, because the gateway stops: predictions
        that need their client's connection fail, and the others are postponed until the restart."""
        for prediction in self._dispatcher.waiting:
            if prediction.request.needs_client:
                await self._fail(prediction, GatewayRestarted("the gateway is being stopped; try again"))
            else:
                prediction.postpone()

    async def _fail(self, prediction: Prediction, error: Exception) -> None:
        await self._dispatcher.stop(prediction, Outcome(Status.FAILED, str(error)))

    async def _excesses(self) -> dict[int, str]:
        """Which budget is used up, by key, for the keys that have waiting predictions."""
        ids = {p.request.key_id for p in self._unfinished() if not self._dispatcher.is_running(p)}
        keys = [key for key_id in ids if (key := self._keys.by_id(key_id)) and has_budget(key)]
        try:
            found = {key.id: (await self._budgets.spent(key, self._unfinished)).excess(key) for key in keys}
        except sqlite3.Error as error:
            logger.error("the budgets cannot be checked: %s", error)
            return {}
        return {key_id: excess for key_id, excess in found.items() if excess}


def _is_late(prediction: Prediction) -> bool:
    seconds = prediction.request.seconds
    return seconds is not None and prediction.age >= seconds
