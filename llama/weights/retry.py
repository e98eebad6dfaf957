"""Retries with exponential back-off.

Knows delays and failures; knows nothing about what is attempted.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from llama.errors import DownloadFailed

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Transient(Exception):
    """A failure after which another attempt may succeed. `retry_after` is the delay that the
    server asked for, in seconds."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Stopped(Exception):
    """The download was stopped by Ctrl-C or by the failure of another file."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How many files are downloaded at once, and how failures are retried. Times are in seconds."""

    workers: int = 4
    attempts: int = 6
    """The number of consecutive failures without progress after which to give up."""
    first_delay: float = 1.0
    """The delay after the first failure. Each further consecutive failure doubles it."""
    longest_delay: float = 60.0
    jitter: float = 0.25
    """The share by which a delay is varied at random, so that many clients do not retry at the same time."""
    longest_retry_after: float = 3600.0
    """The upper bound for the server's own `Retry-After`."""
    timeout: float = 30.0
    """How long a server may send nothing."""

    def call(
        self, attempt: Callable[[], T], reached: Callable[[], int], *, name: str, stop: threading.Event
    ) -> T:
        """Call `attempt` until it succeeds. `reached` returns the progress so far, in bytes.

        Raises DownloadFailed after too many consecutive failures, or Stopped if `stop` is set while waiting.
        """
        furthest, failures = reached(), 0
        while True:
            try:
                return attempt()
            except Transient as error:
                failures = 1 if reached() > furthest else failures + 1
                furthest = max(furthest, reached())
                if failures >= self.attempts:
                    raise DownloadFailed(
                        f"{name}: {error}, {failures} times in a row; pull again later"
                    ) from error
                delay = self._delay(failures, error.retry_after)
                logger.warning("%s: %s; retrying in %.0f s", name, error, delay)
                if stop.wait(delay):
                    raise Stopped from error

    def _delay(self, failures: int, retry_after: float) -> float:
        own = min(self.first_delay * 2.0 ** (failures - 1), self.longest_delay)
        own *= random.uniform(1 - self.jitter, 1 + self.jitter)
        return max(own, min(retry_after, self.longest_retry_after))
