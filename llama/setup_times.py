"""Measures how long each part of the setup takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class SetupTimes:
    """The seconds that each part of the setup took, in order."""

    def __init__(self) -> None:
        self._parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure a `with` block as `name`, without the parts that are measured inside it."""
        started, before = time.perf_counter(), self._total
        yield
        self._parts[name] = time.perf_counter() - started - (self._total - before)

    @property
    def _total(self) -> float:
        return sum(self._parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._parts.items())
        return f"{self._total:.1f} s ({parts})"
