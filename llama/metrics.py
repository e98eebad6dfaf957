"""What a prediction is billed and judged by.

Knows counts and times; knows nothing of Cog but that a scope records a name and a value.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from llama.engine import FinishReason

logger = logging.getLogger(__name__)


class Scope(Protocol):
    """Where metrics go: Cog's prediction scope is one."""

    def record_metric(self, name: str, value: float | str) -> None:
        """Record a value, in place of an earlier one of the same name."""


class NoScope:
    """For use outside Cog: records nothing."""

    def record_metric(self, name: str, value: float | str) -> None:
        pass


def guarded(call: Callable[..., object], failure: str) -> Callable[..., None]:
    """`call`, which may fail: the first failure is logged, and from then on nothing is called. `failure` may
    name the first argument as `{}`."""
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
    """Records in another scope. If that fails, the first failure is logged and the prediction goes on."""

    def __init__(self, scope: Scope) -> None:
        self._record = guarded(
            scope.record_metric, "the metric {} could not be recorded; this prediction records no more"
        )

    def record_metric(self, name: str, value: float | str) -> None:
        self._record(name, value)


class Metrics:
    """The counts and times of one prediction, from the moment that this object is made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._first_token: float | None = None
        self._ended: float | None = None
        self.input_token_count = 0
        self.output_token_count = 0
        self.finish_reason: FinishReason | None = None
        """None until the answer has ended, and for ever when it failed."""

    def count_token(self) -> None:
        """A token of the answer has come."""
        if self._first_token is None:
            self._first_token = time.perf_counter()
        self.output_token_count += 1

    def end(self) -> None:
        """The prediction is over; `values` no longer changes."""
        self._ended = time.perf_counter()

    def values(self) -> dict[str, float | str]:
        """The published metrics by name; seconds, and tokens per second over the whole time."""
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
        """Record the tokens so far, so that they can be billed even if the server is killed."""
        scope.record_metric("output_token_count", self.output_token_count)
