"""Which request has which row: requests wait in order, take a free row, and give it back when they end.

Running requests always have the lowest rows, without a gap, so that a step works on the first rows of every
tensor. Knows requests and rows. Knows nothing of tensors, whose owner (`RowStorage`) it tells what to copy
and to move, nor of why a request ends, which the batch decides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from llama.engine import TokenStream
from llama.sampling_params import SamplingParams
from llama.torch_engine.prefix_cache import PrefixCache, shares_prefix


class RequestState(Enum):
    """Of a request, in the order in which it passes through them."""

    WAITING = auto()
    """It waits for a row."""
    READING = auto()
    """Its prompt is read into its row."""
    DECODING = auto()
    """It gets one token a step."""
    ENDED = auto()


@dataclass(slots=True, eq=False)
class BatchRequest:
    """One request on its way through the engine."""

    tokens: list[int]
    """Prompt and answer so far."""
    prompt_length: int
    params: SamplingParams
    stream: TokenStream
    stretched: bool = False
    """Whether its positions are stretched, so that its keys are of use only to requests of the same kind."""
    state: RequestState = RequestState.WAITING
    cached: int = 0
    """Tokens whose keys and values are in the cache."""

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def prefix_key(self) -> list[int]:
        """Its tokens as the prefix cache knows them: stretched ones have other numbers than plain ones."""
        return [~token for token in self.tokens] if self.stretched else self.tokens


class RowStorage(Protocol):
    """Everything that belongs to a row. The first `count` keys and values are meant."""

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Copy keys and values to another row."""

    def swap(self, source: int, target: int, count: int) -> None:
        """Move a request to another row, and the keys and values of that row to its own."""

    def move(self, source: int, target: int, count: int) -> None:
        """Move a request to another row, whose contents are lost."""

    def clear(self, row: int, count: int) -> None:
        """Overwrite keys and values, which may not be finite."""

    def vacate(self, row: int) -> None:
        """The row has no request any more."""


class Scheduler:
    """Strictly first come, first served. A request is waiting or in exactly one row."""

    def __init__(self, limit: int, rows: RowStorage, *, prefix_reuse: bool) -> None:
        """`limit`: the number of rows."""
        self.running: list[BatchRequest] = []
        """By row."""
        self._limit = limit
        self._waiting: deque[BatchRequest] = deque()
        self._rows = rows
        self._prefixes = PrefixCache(limit)
        self._prefix_reuse = prefix_reuse

    def add(self, request: BatchRequest) -> None:
        """Queue a request behind all others."""
        self._waiting.append(request)

    def next_prefill(self, beside: Collection[int] = ()) -> tuple[int, BatchRequest] | None:
        """The row and request whose prompt is read next: one that has begun, otherwise the one that has
        waited longest, if a row is free.

        `beside` are rows that are read in the same step. A request that could reuse a prefix of one of them
        waits for it.
        """
        for row, request in enumerate(self.running):
            if request.state is RequestState.READING and row not in beside:
                return row, request
        if not self._waiting or len(self.running) == self._limit:
            return None
        row, request = len(self.running), self._waiting[0]
        key = request.prefix_key
        if self._prefix_reuse and any(shares_prefix(self.running[r].prefix_key, key) for r in beside):
            return None
        self._waiting.popleft().state = RequestState.READING
        self.running.append(request)
        return row, request

    def reuse_prefix(self, row: int) -> None:
        """Let the request in the last row begin with the longest prefix of its prompt that is cached."""
        assert row == len(self.running) - 1
        if not self._prefix_reuse:
            return
        request = self.running[row]
        held = [other.prefix_key[: other.cached] for other in self.running[:row]]
        copies, shared = self._prefixes.reuse(row, request.prefix_key, held)
        for copy in copies:
            self._rows.copy_prefix(*copy)
        request.cached = shared

    def forget_prefixes(self) -> None:
        """Forget all cached prefixes: after a failure, the contents of free rows are unknown."""
        self._prefixes = PrefixCache(self._limit)

    def release(self, row: int, *, sound: bool = True) -> None:
        """Take a request out of its row, into which the last running one moves. Its keys and values stay for
        others to reuse, unless they are not `sound`."""
        request, last = self.running[row], self.running[-1]
        end = len(self.running) - 1
        keep = sound and self._prefix_reuse
        if not sound:
            self._rows.clear(row, request.cached)
        if row != end and keep:
            self._rows.swap(end, row, max(request.cached, last.cached))
        elif row != end:
            self._rows.move(end, row, last.cached)
        self._rows.vacate(end)
        self._prefixes.keep(end, request.prefix_key[: request.cached] if keep else [])
        self.running[row] = last
        self.running.pop()
        request.state = RequestState.ENDED

    def drop_cancelled_waiting(self) -> None:
        """Drop requests that were cancelled before they had a row."""
        for request in self._waiting:
            if request.stream.cancelled:
                request.state = RequestState.ENDED
        self._waiting = deque(request for request in self._waiting if request.state is RequestState.WAITING)

    @property
    def decoding(self) -> int:
        """The number of requests that take one token a step."""
        return sum(request.state is RequestState.DECODING for request in self.running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not self.running and not self._waiting
