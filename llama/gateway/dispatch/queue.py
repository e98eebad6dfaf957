"""The predictions that wait for a server, in one queue per key.

Knows the order. Knows nothing about servers or HTTP.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

from llama.gateway.prediction import Prediction
from llama.gateway.problems import throttled

_RETRY_AFTER = 2  # seconds; OpenAI's client waits as long as it is told to


class FairQueue:
    """Serves the keys in rotation, however many predictions each has."""

    def __init__(self, limit: int) -> None:
        """At most `limit` predictions of one key wait at the same time."""
        self._limit = limit
        self._by_key = OrderedDict[int, deque[Prediction]]()
        self._reserved = Counter[int]()

    def __len__(self) -> int:
        return sum(len(waiting) for waiting in self._by_key.values())

    def __iter__(self) -> Iterator[Prediction]:
        return chain.from_iterable(self._by_key.values())

    @property
    def oldest_age(self) -> float:
        """Seconds since the creation of the prediction that has waited longest; 0 if none waits."""
        return max((waiting[0].age for waiting in self._by_key.values()), default=0.0)

    @contextmanager
    def room_for(self, key_id: int, count: int = 1) -> Iterator[None]:
        """Reserve places in a key's queue. Raises Problem 429 if it has too few. An empty queue has room for
        every request, however many choices it asks for."""
        taken = len(self._by_key.get(key_id, ())) + self._reserved[key_id]
        if taken and taken + count > self._limit:
            raise throttled(
                f"The queue of this key is full: at most {self._limit} predictions can wait. Try again when "
                "one of them has started.",
                _RETRY_AFTER,
            )
        self._reserved[key_id] += count
        try:
            yield
        finally:
            self._reserved[key_id] -= count

    def add(self, prediction: Prediction) -> None:
        """Append a prediction to the queue of its key."""
        self._by_key.setdefault(prediction.request.key_id, deque()).append(prediction)

    def add_first(self, prediction: Prediction) -> None:
        """Put a prediction that lost its server back, before all others."""
        key_id = prediction.request.key_id
        self._by_key.setdefault(key_id, deque()).appendleft(prediction)
        self._by_key.move_to_end(key_id, last=False)

    def next(self, may_run: Callable[[int], bool]) -> Prediction | None:
        """Remove and return the first prediction of the next key in the rotation. `may_run` tells whether a
        key may run one more."""
        for key_id, waiting in self._by_key.items():
            if may_run(key_id):
                prediction = waiting.popleft()
                self._by_key.move_to_end(key_id)
                self._forget_if_empty(key_id)
                return prediction
        return None

    def remove(self, prediction: Prediction) -> bool:
        """Remove a prediction. Returns False if it is not waiting."""
        waiting = self._by_key.get(prediction.request.key_id, deque())
        if prediction not in waiting:
            return False
        waiting.remove(prediction)
        self._forget_if_empty(prediction.request.key_id)
        return True

    def _forget_if_empty(self, key_id: int) -> None:
        if not self._by_key[key_id]:
            del self._by_key[key_id]
