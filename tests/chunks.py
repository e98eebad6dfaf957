"""Splits the input of streaming objects into chunks."""

from __future__ import annotations

import itertools
from typing import TypeVar

T = TypeVar("T", list[int], str)


def in_chunks(items: T, cuts: list[int]) -> list[T]:
    """Split the items into chunks whose lengths repeat those in `cuts`."""
    chunks, start = list[T](), 0
    lengths = itertools.cycle(cuts)
    while start < len(items):
        end = start + next(lengths)
        chunks.append(items[start:end])
        start = end
    return chunks
