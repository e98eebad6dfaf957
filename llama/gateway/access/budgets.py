"""The monthly budgets of keys, in tokens and in dollars. A month is a calendar month in UTC.

Running predictions count with the tokens that their servers have reported so far. Knows nothing about the
queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal

from llama.gateway.prediction import Prediction
from llama.gateway.prices import Prices
from llama.gateway.problems import over_budget
from llama.gateway.storage.keys import Key
from llama.gateway.storage.storage import Storage


@dataclass(frozen=True)
class Spent:
    """What a key has used in a month."""

    tokens: int
    dollars: Decimal

    def excess(self, key: Key) -> str | None:
        """Return which budget of the key is used up, as part of a sentence; None if none is."""
        tokens, dollars = key.limits.monthly_tokens, key.limits.monthly_dollars
        if tokens is not None and self.tokens >= tokens:
            return f"it has used {self.tokens} of its {tokens} tokens of this month"
        if dollars is not None and self.dollars >= dollars:
            return f"it has used ${self.dollars:.6f} of its ${dollars:f} of this month"
        return None


class Budgets:
    """Compares the usage of keys with their budgets."""

    def __init__(self, storage: Storage, prices: Prices, today: Callable[[], date] | None = None) -> None:
        """`today` returns the day in UTC. None means the system's clock."""
        self._storage, self._prices, self._today = storage, prices, today or _today

    async def spent(self, key: Key, unfinished: Callable[[], Iterable[Prediction]]) -> Spent:
        """Return what a key has used in this month. `unfinished` returns the predictions that are not stored
        as ended. Raises sqlite3.Error."""
        first = self._today().replace(day=1)
        tokens = await self._storage.run(lambda store: store.usage.tokens(key.id, first))
        # The storage answers in order, so each prediction is now either in the table or unfinished.
        for prediction in unfinished():
            if prediction.request.key_id == key.id and prediction.day >= first:
                tokens += prediction.tokens
        return Spent(tokens.input + tokens.output, self._prices.of(tokens.input, tokens.output))

    async def check(self, key: Key, unfinished: Callable[[], Iterable[Prediction]]) -> None:
        """Raises Problem 402 if a budget of the key is used up, and sqlite3.Error."""
        if not has_budget(key):
            return
        if excess := (await self.spent(key, unfinished)).excess(key):
            raise over_budget(
                f"The monthly budget of this key is used up: {excess}. Wait for the first day of the next "
                "month (UTC), or ask the operator of the gateway for a larger budget."
            )


def has_budget(key: Key) -> bool:
    return key.limits.monthly_tokens is not None or key.limits.monthly_dollars is not None


def _today() -> date:
    return datetime.now(UTC).date()
