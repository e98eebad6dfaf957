"""The prefixes of earlier requests that are still in free rows of the key/value cache.

The keys and values of a finished request stay in a row until the row is needed. A later prompt with the same
prefix starts from a copy. Knows token ids and rows; knows nothing about tensors: it returns which rows to
copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# A shorter prefix is not worth a copy: most prompts share a few first tokens, such as BOS and "[INST]".
_WORTH_A_COPY = 16


class Copy(NamedTuple):
    """Copy the first `length` positions of row `source` to row `target`."""

    source: int
    target: int
    length: int


class PrefixCache:
    """The cached token ids of rows without a request. The least recently used are overwritten first."""

    def __init__(self, rows: int) -> None:
        self._kept: list[list[int]] = [[] for _ in range(rows)]
        self._used = [0] * rows  # the value of `_clock` when each row was last used
        self._clock = 0

    def __getitem__(self, row: int) -> list[int]:
        return self._kept[row]

    def keep(self, row: int, token_ids: list[int]) -> None:
        """Record that a row has no request, and has the keys and values of `token_ids`."""
        self._kept[row] = token_ids
        self._touch(row)

    def reuse(self, home: int, prompt: list[int], running: Sequence[list[int]]) -> tuple[list[Copy], int]:
        """Return the copies, in order, that give the free row `home` the longest cached prefix of `prompt`,
        and the length of that prefix. It never includes the last token of `prompt`, whose logits are needed.

        `running` has the cached token ids of the rows below `home`.
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
        """Return the row that has the longest prefix of `prompt`, and its length; (-1, 0) if no row has one.

        A free row is preferred to a running one with the same length.
        """
        contents = [*running, *self._kept[len(running) :]]
        shared, row = max((_shared_length(prompt[:-1], held), row) for row, held in enumerate(contents))
        return (row, shared) if shared else (-1, 0)

    def _rescue(self, home: int, source: int) -> list[Copy]:
        """Move the contents of `home` to the least recently used free row, unless that is `home` itself.

        Returns the copies that this needs.
        """
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
    """Return whether two lists of token ids share a prefix that is long enough to be copied."""
    return len(a) > _WORTH_A_COPY and a[:_WORTH_A_COPY] == b[:_WORTH_A_COPY]


def _shared_length(wanted: list[int], held: list[int]) -> int:
    """Return the length of the common prefix of two lists of token ids, or 0 if it is not worth a copy."""
    if len(wanted) < _WORTH_A_COPY or wanted[:_WORTH_A_COPY] != held[:_WORTH_A_COPY]:
        return 0
    count = min(len(wanted), len(held))
    different = np.flatnonzero(np.asarray(wanted[:count]) != np.asarray(held[:count]))
    return int(different[0]) if len(different) else count
