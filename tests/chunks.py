"""Cuts what is fed to streaming parts, to feed it in pieces."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T", list[int], str)


def in_chunks(items: T, cuts: list[int]) -> list[T]:
    """The items in pieces whose lengths are `cuts`, over and over."""
    chunks, start, turn = list[T](), 0, 0
    while start < len(items):
        end = start + cuts[turn % len(cuts)]
        chunks.append(items[start:end])
        start, turn = end, turn + 1
    return chunks
