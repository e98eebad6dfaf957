"""The metrics of a prediction: token counts, times and the finish reason.

Knows counts and times. Knows nothing about Cog, except that a scope records a name and a value.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from llama.engine import FinishReason

logger = logging.getLogger(__name__)


class Scope(Protocol):
    """An object that records metrics, such as the scope of a Cog prediction."""

    def record_metric(self, name: str, value: float | str) -> None:
        """Record a value, which replaces an earlier one with the same name."""


class NoScope:
    """Records nothing. For use outside Cog."""

    def record_metric(self, name: str, value: float | str) -> None:
        pass


def guarded(call: Callable[..., object], failure: str) -> Callable[..., None]:
    """Return a function that calls `call` until a call fails.

    That failure is logged with the text `failure`, in which `{}` stands for the first argument. Later calls
    do nothing.
    """
    failed = False

    def guard(*arguments: object) -> None:
        nonlocal failed
        if failed:
            return
        try:
            call(*arguments)
        except Exception:
            failed = True
            logger.exception(failure.format(*arguments))

    return guard


class GuardedScope:
    """Records metrics in another scope until that fails. It logs the first failure and raises no error."""

    def __init__(self, scope: Scope) -> None:
        self._record = guarded(
            scope.record_metric,
            "the metric {} could not be recorded; no more metrics are recorded for this prediction",
        )

    def record_metric(self, name: str, value: float | str) -> None:
        self._record(name, value)


class Metrics:
    """The counts and times of one prediction, which starts when this object is created."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._first_token: float | None = None
        self._ended: float | None = None
        self.input_token_count = 0
        self.output_token_count = 0
        self.finish_reason: FinishReason | None = None
        """None while the answer is running, and after a failure."""

    def count_token(self) -> None:
        """Count one token of the answer, and record when the first one arrives."""
        if self._first_token is None:
            self._first_token = time.perf_counter()
        self.output_token_count += 1

    def end(self) -> None:
        """End the prediction: `values` no longer changes."""
        self._ended = time.perf_counter()

    def values(self) -> dict[str, float | str]:
        """Return the published metrics by name. Times are in seconds, the average speed in tokens/s."""
        elapsed = (time.perf_counter() if self._ended is None else self._ended) - self._started
        values: dict[str, float | str] = {
            "input_token_count": self.input_token_count,
            "output_token_count": self.output_token_count,
            "tokens_per_second": self.output_token_count / elapsed,
        }
        if self.finish_reason is not None:
            values["finish_reason"] = self.finish_reason
        if self._first_token is not None:
            values["time_to_first_token"] = self._first_token - self._started
        return values

    def record(self, scope: Scope) -> None:
        """Record all values."""
        for name, value in self.values().items():
            scope.record_metric(name, value)

    def record_progress(self, scope: Scope) -> None:
        """Record the number of tokens so far, so that it can be billed even if the server is killed."""
        scope.record_metric("output_token_count", self.output_token_count)
