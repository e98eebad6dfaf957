"""Who runs: requests wait in order, take a slot when one is free, and leave between steps.

Knows requests and slots; knows nothing of tensors, threads or sampling.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from llama.engine import TokenStream
from llama.sampling import SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way through the engine."""

    prompt: list[int]
    params: SamplingParams
    stream: TokenStream
    cached: int = 0
    """Tokens of prompt and answer whose keys and values are in the cache."""
    generated: int = 0
    last_token: int = 0

    @property
    def prefilled(self) -> bool:
        return self.cached >= len(self.prompt)


class Scheduler:
    """Strictly first come, first served. A sequence is waiting or in exactly one slot."""

    def __init__(self, slots: int) -> None:
        self._free = list(range(slots))
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}  # in order of admission

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind all others."""
        self._waiting.append(sequence)

    def admit(self) -> Iterator[tuple[int, Sequence]]:
        """Give the lowest free slots to those who have waited longest."""
        while self._waiting and self._free:
            slot = heapq.heappop(self._free)
            self._running[slot] = self._waiting.popleft()
            yield slot, self._running[slot]

    def release(self, slot: int) -> None:
        """Take a sequence out of its slot, which is free at once."""
        del self._running[slot]
        heapq.heappush(self._free, slot)

    def drop_cancelled_waiting(self) -> None:
        """Forget those who gave up before they had a slot."""
        self._waiting = deque(s for s in self._waiting if not s.stream.cancelled)

    @property
    def cancelled(self) -> list[int]:
        """Slots of sequences whose callers have left."""
        return [slot for slot, sequence in self._running.items() if sequence.stream.cancelled]

    @property
    def prefilling(self) -> tuple[int, Sequence] | None:
        """The first admitted sequence whose prompt is not in the cache yet."""
        return next(((s, q) for s, q in self._running.items() if not q.prefilled), None)

    @property
    def decoding(self) -> list[tuple[int, Sequence]]:
        """Sequences that take one token a step, by slot."""
        return sorted((s, q) for s, q in self._running.items() if q.prefilled)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    def drain(self) -> list[Sequence]:
        """Take everybody out, running and waiting."""
        everybody = [*self._running.values(), *self._waiting]
        self._waiting.clear()
        for slot in list(self._running):
            self.release(slot)
        return everybody
