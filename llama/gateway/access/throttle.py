"""Limits how many predictions a key creates per minute. Knows nothing about HTTP or the queue."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from llama.gateway.problems import throttled
from llama.gateway.storage.keys import Key


class Throttle:
    """A token bucket for every key with a limit. A key that has been idle for a minute can use the whole
    minute's requests at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[int, tuple[float, float]] = {}
        """By key id: how many requests were left at which time."""

    def check(self, key: Key) -> None:
        """Count one request. Raises Problem 429, without counting the request, if the key has none left."""
        limit = key.requests_per_minute
        if limit is None:
            return
        now = self._clock()
        left, then = self._buckets.get(key.id, (float(limit), now))
        left = min(float(limit), left + (now - then) * limit / 60)
        if left < 1:
            seconds = max(1, math.ceil((1 - left) * 60 / limit))
            raise throttled(f"Request was throttled. Your rate limit resets in ~{seconds}s.", seconds)
        self._buckets[key.id] = (left - 1, now)
