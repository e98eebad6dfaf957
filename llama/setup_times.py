"""Measures how long each part of the setup took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import local


class SetupTimes:
    """The seconds that each part of the setup took, in the order in which they ended.

    Parts on different threads may have run at the same time.
    """

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._parts: dict[str, float] = {}
        self._thread = local()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure a `with` block as `name`. The time of parts inside it on the same thread is subtracted."""
        started, before = time.perf_counter(), getattr(self._thread, "measured", 0.0)
        yield
        seconds = time.perf_counter() - started
        self._parts[name] = seconds - (getattr(self._thread, "measured", 0.0) - before)
        self._thread.measured = before + seconds

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._parts.items())
        return f"{time.perf_counter() - self._started:.1f} s ({parts})"
