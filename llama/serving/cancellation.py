"""The bridge from Cog's cancel to a running stream.

Cog cancels a prediction (a POST to its cancel URL, a dropped connection) by calling `cancel()` on
the `concurrent.futures.Future` under which `run()` was scheduled. That future is done as soon as
`run()` has returned its generator, so nothing would stop. Here the future is found from inside
`run()` and its `cancel` is extended.

This leans on private parts of CPython (`Task._callbacks`, and the closure of the callback that chains
a task to a future). Where they are not found a prediction runs to its end: it cannot be cancelled,
nothing else changes. An end-to-end test notices.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future


class Cancellation:
    """Set once, by any thread; calls what was registered, at once when it is set already."""

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
        """Call `callback` when set; it may be called more than once."""
        with self._lock:
            self._callback = callback
            already = self._set
        if already:
            callback()


def cancellation_of_current_task() -> Cancellation:
    """To be called inside `run()`: set when Cog cancels this prediction."""
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
