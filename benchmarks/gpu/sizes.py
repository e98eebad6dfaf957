"""The numbers of requests and tokens that are measured. Knows nothing about how."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of requests and tokens."""

    rows: int = 32
    """The most requests at once."""
    context: int = 4096
    heights: tuple[int, ...] = (1, 4, 8, 16, 32)
    """The numbers of requests whose decode steps are measured."""
    prompt: int = 512
    """Tokens in the row of each of these requests."""
    room: int = 128
    """Tokens that each of these rows has room for beside the prompt."""
    chunks: tuple[int, ...] = (256, 512, 1024, 2048)
    """The numbers of prompt tokens per step that are compared."""
    long: int = 4000
    """Tokens of the long request in a batch of mixed lengths, and of a long prompt."""
    short: int = 200
    """Tokens of each other request in that batch."""
    repeats: int = 20


FULL = Sizes()
SMALL = Sizes(
    rows=4, context=256, heights=(1, 4), prompt=48, room=16, chunks=(32, 64), long=200, short=20, repeats=2
)
