"""Who runs: requests wait in order, take a row of the cache when one is free, and leave between steps.

Running requests always have the lowest rows, without a gap, so that a step works on the first rows of
every tensor. Knows requests and rows; knows nothing of tensors, threads or sampling: whoever holds
tensors by row (`Rows`) is told what to copy and to move.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from llama.engine import TokenStream
from llama.sampling import SamplingParams
from llama.torch_engine.prefix_cache import PrefixCache, alike


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way through the engine."""

    tokens: list[int]
    """Prompt and answer so far."""
    prompt_length: int
    params: SamplingParams
    stream: TokenStream
    cached: int = 0
    """Tokens whose keys and values are in the cache."""
    stretched: bool = False
    """Whether its positions are stretched, so that its keys are of use to its like only."""

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def prefix_key(self) -> list[int]:
        """What the prefix cache knows its tokens by: stretched ones have other numbers than plain ones."""
        return [~token for token in self.tokens] if self.stretched else self.tokens

    @property
    def decoding(self) -> bool:
        """Whether it takes one token a step, its prompt being read."""
        return self.cached >= self.prompt_length


class Rows(Protocol):
    """Keys and values by row."""

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` positions of a row to another."""

    def swap(self, a: int, b: int, count: int) -> None:
        """Exchange the first `count` positions of two rows."""


class Scheduler:
    """Strictly first come, first served. A sequence is waiting or in exactly one row."""

    def __init__(self, rows: int, cache: Rows, *, prefix_reuse: bool) -> None:
        self.running: list[Sequence] = []
        """By row."""
        self._limit = rows
        self._waiting: deque[Sequence] = deque()
        self._cache = cache
        self._prefixes = PrefixCache(rows)
        self._prefix_reuse = prefix_reuse

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind all others."""
        self._waiting.append(sequence)

    def next_prefill(self, beside: Collection[int] = ()) -> tuple[int, Sequence] | None:
        """The sequence whose prompt is to be read now, and its row: the one that was begun, otherwise the one
        that has waited longest, if a row is free for it. `beside` are rows that are read in the same step: a
        sequence that could begin with what one of them is about to hold waits for it."""
        for row, sequence in enumerate(self.running):
            if not sequence.decoding and row not in beside:
                return row, sequence
        if not self._waiting or len(self.running) == self._limit:
            return None
        row, sequence = len(self.running), self._waiting[0]
        key = sequence.prefix_key
        if self._prefix_reuse and any(alike(self.running[r].prefix_key, key) for r in beside):
            return None
        self.running.append(self._waiting.popleft())
        return row, sequence

    def reuse_prefix(self, row: int) -> None:
        """Let the sequence in the last row begin with the longest prefix of its prompt that is cached."""
        assert row == len(self.running) - 1
        if not self._prefix_reuse:
            return
        sequence = self.running[row]
        held = [other.prefix_key[: other.cached] for other in self.running[:row]]
        copies, shared = self._prefixes.place(row, sequence.prefix_key, held)
        for copy in copies:
            self._cache.copy(*copy)
        sequence.cached = shared

    def forget_prefixes(self) -> None:
        """Forget all cached prefixes: after a failure, the contents of free rows are unknown."""
        self._prefixes = PrefixCache(self._limit)

    def release(self, row: int, *, keep: bool = True) -> int | None:
        """Take a sequence out. The last running one moves into its row: the row that it left, if any.
        What the sequence had in the cache stays for others to begin with, unless `keep` is false."""
        sequence, last = self.running[row], self.running[-1]
        end = len(self.running) - 1
        keep = keep and self._prefix_reuse
        if row != end:
            if keep:
                self._cache.swap(row, end, max(sequence.cached, last.cached))
            else:
                self._cache.copy(end, row, last.cached)
        self._prefixes.keep(end, sequence.prefix_key[: sequence.cached] if keep else [])
        self.running[row] = last
        self.running.pop()
        return end if row != end else None

    def drop_cancelled_waiting(self) -> None:
        """Forget those who gave up before they had a row."""
        self._waiting = deque(s for s in self._waiting if not s.stream.cancelled)

    @property
    def decoding(self) -> int:
        """How many take one token a step."""
        return sum(sequence.decoding for sequence in self.running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not self.running and not self._waiting
