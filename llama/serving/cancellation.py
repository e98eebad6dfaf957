"""Stops a running stream when Cog cancels its prediction.

To cancel a prediction, after a POST to its cancel URL or a dropped connection, Cog calls `cancel()` on the
`concurrent.futures.Future` of `run()`. That future is done as soon as `run()` has returned its generator, so
the call alone stops nothing. This module finds the future from inside `run()` and wraps its `cancel` method.

It relies on CPython internals: `Task._callbacks`, and the closure of the callback that chains a task to a
future. If they are missing, predictions cannot be cancelled, but everything else works. An end-to-end test
detects this.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future


class Cancellation:
    """A thread-safe flag that calls a registered callback when it is set."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._set = False
        self._callback: Callable[[], object] | None = None

    def set(self) -> None:
        with self._lock:
            self._set = True
            callback = self._callback
        if callback:
            callback()

    def on_cancel(self, callback: Callable[[], object]) -> None:
        """Call `callback` when the flag is set, or immediately if it already is.

        The callback may be called more than once.
        """
        with self._lock:
            self._callback = callback
            already = self._set
        if already:
            callback()


def cancellation_of_current_task() -> Cancellation:
    """Return a Cancellation that is set when Cog cancels the current prediction. Call it inside `run()`."""
    cancellation = Cancellation()
    if (future := _future_of_current_task()) is not None:
        original = future.cancel

        def cancel() -> bool:
            cancellation.set()
            return original()

        future.cancel = cancel  # type: ignore[method-assign]
    return cancellation


def _future_of_current_task() -> Future[object] | None:
    task = asyncio.current_task()
    for callback, _ in getattr(task, "_callbacks", None) or ():
        for cell in getattr(callback, "__closure__", None) or ():
            if isinstance(cell.cell_contents, Future):
                return cell.cell_contents
    return None
