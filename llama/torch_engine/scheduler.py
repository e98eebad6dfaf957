"""Assign rows to requests: requests wait in order, take a free row, and return it when they end.

Running requests always have the lowest rows, without a gap, so that a step works on the first rows of every
tensor. Knows requests and rows. Knows nothing about tensors (it tells their owner, a `RowStorage`, what to
copy and move) or about why a request ends (the batch decides that).
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
    """The states of a request, in order. It may go to ENDED from every other state."""

    WAITING = auto()
    """The request is waiting for a row."""
    READING = auto()
    """Its prompt is being read into its row."""
    DECODING = auto()
    """It gets one token per step."""
    ENDED = auto()


@dataclass(slots=True, eq=False)
class BatchRequest:
    """One request in the engine."""

    tokens: list[int]
    """The prompt, and the answer so far."""
    prompt_length: int
    params: SamplingParams
    stream: TokenStream
    stretched: bool = False
    """Whether its positions are stretched (`ModelParts.stretched_from`). If so, only other stretched requests
    can reuse its keys."""
    state: RequestState = RequestState.WAITING
    cached: int = 0
    """The number of tokens whose keys and values are in the cache."""

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def prefix_key(self) -> list[int]:
        """Its tokens for the prefix cache. The ids of a stretched request are
        negated, so that they match only those of other stretched requests."""
        return [~token for token in self.tokens] if self.stretched else self.tokens


class RowStorage(Protocol):
    """Everything that belongs to a row. Every `count` is a number of positions, from the first one."""

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Copy keys and values to another row."""

    def swap(self, source: int, target: int, count: int) -> None:
        """Move a request to row `target`, and exchange the keys and values of both rows."""

    def move(self, source: int, target: int, count: int) -> None:
        """Move a request to another row, and overwrite that row's contents."""

    def clear(self, row: int, count: int) -> None:
        """Overwrite keys and values, because they may not be finite."""

    def vacate(self, row: int) -> None:
        """Record that a row no longer has a request."""


class Scheduler:
    """Strictly first come, first served. A request is waiting or in exactly one row."""

    def __init__(self, limit: int, rows: RowStorage, *, prefix_reuse: bool) -> None:
        """`limit` is the number of rows."""
        self.running: list[BatchRequest] = []
        """The running requests, by row."""
        self._limit = limit
        self._waiting: deque[BatchRequest] = deque()
        self._rows = rows
        self._prefixes = PrefixCache(limit)
        self._prefix_reuse = prefix_reuse

    def add(self, request: BatchRequest) -> None:
        """Add a request to the end of the queue."""
        self._waiting.append(request)

    def next_prefill(self, beside: Collection[int] = ()) -> tuple[int, BatchRequest] | None:
        """Return the row and request whose prompt is read next, or None.

        This is a request whose prompt has been read in part. If there is none, and a row is free, it is the
        request that has waited longest. `beside` has the rows that are read in the same step. A request that
        could reuse a prefix of one of them waits for it.
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
        """Copy the longest cached prefix of a request's prompt into its row, which must be the last."""
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
        """Take a request out of its row, and move the last running request there.

        If the keys and values of the removed request are `sound`, they stay in the cache for other requests
        to reuse. Otherwise, they are overwritten.
        """
        request, last = self.running[row], self.running[-1]
        end = len(self.running) - 1
        keep = sound and self._prefix_reuse
        if not sound:
            self._rows.clear(row, request.cached)
        if row != end and keep:
            self._rows.swap(end, row, max(request.cached, last.cached))
        elif row != end:
            self._rows.move(end, row, last.cached)
            if last.state is not RequestState.DECODING:
                self._rows.clear(end, last.cached)  # nothing has checked that these are finite
        self._rows.vacate(end)
        self._prefixes.keep(end, request.prefix_key[: request.cached] if keep else [])
        self.running[row] = last
        self.running.pop()
        request.state = RequestState.ENDED

    def drop_cancelled_waiting(self) -> None:
        """Drop requests that were cancelled before they got a row."""
        for request in self._waiting:
            if request.stream.cancelled:
                request.state = RequestState.ENDED
        self._waiting = deque(request for request in self._waiting if request.state is RequestState.WAITING)

    @property
    def decoding(self) -> int:
        """The number of requests that get one token per step."""
        return sum(request.state is RequestState.DECODING for request in self.running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not self.running and not self._waiting
