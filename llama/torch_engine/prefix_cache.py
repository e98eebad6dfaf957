"""Which prefixes of earlier requests the free rows of the key/value cache hold, and which of them to reuse.

A finished request's keys and values stay in a row until the row is needed. A later prompt with the same
prefix starts from a copy. Knows token ids and rows; knows nothing of tensors: it says what to copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Fewer shared tokens than this are computed again: every prompt shares its first with every other.
_WORTH_A_COPY = 16


class Copy(NamedTuple):
    """The first `length` positions of row `source`, to be copied to row `target`."""

    source: int
    target: int
    length: int


class PrefixCache:
    """Token ids by row, for rows without a running request; the least recently used go first."""

    def __init__(self, rows: int) -> None:
        self._kept: list[list[int]] = [[] for _ in range(rows)]
        self._used = [0] * rows  # when a row's contents last served, on the clock below
        self._clock = 0

    def __getitem__(self, row: int) -> list[int]:
        return self._kept[row]

    def keep(self, row: int, token_ids: list[int]) -> None:
        """A row holds the keys and values of `token_ids` from here on, and no request."""
        self._kept[row] = token_ids
        self._touch(row)

    def reuse(self, home: int, prompt: list[int], running: Sequence[list[int]]) -> tuple[list[Copy], int]:
        """Return the copies, in order, that give the free row `home` the longest cached prefix of `prompt`,
        and the length of that prefix. It never includes the last token, whose logits are needed.

        `running` are the cached token ids of the rows below `home`.
        """
        source, shared = self._best_match(prompt, running)
        if shared and source >= home:
            self._touch(source)
        copies = []
        if 2 * (shared if source == home else 0) < len(self._kept[home]):
            copies += self._rescue(home, source)
        if shared and source != home:
            copies.append(Copy(source, home, shared))
        self._kept[home] = []
        return copies, shared

    def _best_match(self, prompt: list[int], running: Sequence[list[int]]) -> tuple[int, int]:
        """The row that shares most of its beginning with `prompt`, and how much: a free one if equal."""
        contents = [*running, *self._kept[len(running) :]]
        shared, row = max((_shared_length(prompt[:-1], held), row) for row, held in enumerate(contents))
        return (row, shared) if shared else (-1, 0)

    def _rescue(self, home: int, source: int) -> list[Copy]:
        """Move what `home` holds over what was used least of all, unless that is `home` itself."""
        others = [row for row in range(home + 1, len(self._kept)) if row != source]
        oldest = min(others, key=lambda row: self._used[row] if self._kept[row] else -1, default=home)
        if oldest == home or (self._kept[oldest] and self._used[oldest] > self._used[home]):
            return []
        self._kept[oldest], self._used[oldest] = self._kept[home], self._used[home]
        return [Copy(home, oldest, len(self._kept[home]))]

    def _touch(self, row: int) -> None:
        self._clock += 1
        self._used[row] = self._clock


def shares_prefix(a: list[int], b: list[int]) -> bool:
    """Whether two lists of token ids share a prefix that is long enough to be copied."""
    return len(a) > _WORTH_A_COPY and a[:_WORTH_A_COPY] == b[:_WORTH_A_COPY]


def _shared_length(wanted: list[int], held: list[int]) -> int:
    """How many token ids two sequences have in common from the beginning; 0 when hardly any."""
    if len(wanted) < _WORTH_A_COPY or wanted[:_WORTH_A_COPY] != held[:_WORTH_A_COPY]:
        return 0
    count = min(len(wanted), len(held))
    different = np.flatnonzero(np.asarray(wanted[:count]) != np.asarray(held[:count]))
    return int(different[0]) if len(different) else count
