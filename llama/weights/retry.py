"""Trying again: how often, how long after, and when to give up.

Knows seconds and failures; knows nothing of what is tried.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from llama.errors import DownloadFailed
from llama.weights.http import Transient

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Stopped(Exception):
    """Another file's trouble, or Ctrl-C, ended this one; what it has is kept."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How many files at once, and how long a server in trouble is waited for. Times in seconds."""

    workers: int = 4
    attempts: int = 6
    """In a row, without one new byte."""
    first_delay: float = 1.0
    """Doubled at every failure in a row."""
    longest_delay: float = 60.0
    jitter: float = 0.25
    """The share by which a delay is longer or shorter, so that many clients do not come back at once."""
    longest_retry_after: float = 3600.0
    """The most that a server's own `Retry-After` is obeyed."""
    timeout: float = 30.0
    """Without a byte."""

    def call(
        self, attempt: Callable[[], T], reached: Callable[[], int], *, name: str, stop: threading.Event
    ) -> T:
        """Call until it succeeds. Raises DownloadFailed when it fails too often without getting further."""
        furthest, failures = reached(), 0
        while True:
            try:
                return attempt()
            except Transient as error:
                failures = 1 if reached() > furthest else failures + 1
                furthest = max(furthest, reached())
                if failures >= self.attempts:
                    raise DownloadFailed(
                        f"{name}: {error}, {failures} times in a row; pull again later, what has come is kept"
                    ) from error
                delay = self._delay(failures, error.retry_after)
                logger.warning("%s: %s; once more in %.0f s", name, error, delay)
                if stop.wait(delay):
                    raise Stopped from error

    def _delay(self, failures: int, retry_after: float) -> float:
        own = min(self.first_delay * 2.0 ** (failures - 1), self.longest_delay)
        own *= random.uniform(1 - self.jitter, 1 + self.jitter)
        return max(own, min(retry_after, self.longest_retry_after))
