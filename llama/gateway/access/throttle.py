"""Limits how many predictions a key creates per minute. Knows nothing about HTTP or the queue."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from llama.gateway.problems import more_than_possible, throttled
from llama.gateway.storage.keys import Key


class Throttle:
    """A token bucket for every key with a limit. A key that has been idle for a minute can use the whole
    minute's requests at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[int, tuple[float, float]] = {}
        """By key id: how many requests were left at which time."""

    def check(self, key: Key, count: int = 1) -> None:
        """Count some predictions. Raises Problem, without counting them: 429 if the key has too few left, 400
        if it never has so many."""
        limit = key.limits.requests_per_minute
        if limit is None:
            return
        if count > limit:
            raise more_than_possible(count, f"this key may create at most {limit} per minute")
        now = self._clock()
        left, then = self._buckets.get(key.id, (float(limit), now))
        left = min(float(limit), left + (now - then) * limit / 60)
        if left < count:
            seconds = max(1, math.ceil((count - left) * 60 / limit))
            raise throttled(f"Request was throttled. Your rate limit resets in ~{seconds}s.", seconds)
        self._buckets[key.id] = (left - count, now)
