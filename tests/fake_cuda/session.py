"""Lets torch report a fake GPU, lets threads create fake tensors, and records what runs on them.

Knows how the parts of this package are put together; knows nothing about the engine.
"""

# mypy: disable-error-code="no-untyped-call"
# Many internals of torch have no types.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fake_cuda.gpu import FakeGpu
from fake_cuda.kernel_costs import H100, Card
from fake_cuda.memory import Memory
from fake_cuda.patches import new_fake_mode, replaced_cuda
from fake_cuda.trace import Trace


class Fakes:
    """A fake GPU, its memory, and a trace of what ran on it."""

    def __init__(self, card: Card = H100, total: int = 2**40) -> None:
        self.card = card
        self.memory, self.trace = Memory(card), Trace(card)
        self.gpu = FakeGpu(card, total, memory=self.memory, trace=self.trace)

    def enter_this_thread(self) -> None:
        """Let this thread create fake tensors until it ends. Modes of torch belong to one thread."""
        new_fake_mode().__enter__()
        self.memory.__enter__()
        self.trace.__enter__()


@contextmanager
def fake_gpu(card: Card = H100, total: int = 2**40) -> Iterator[Fakes]:
    """Let torch report a GPU with `total` bytes of memory. Threads that use it call `enter_this_thread`."""
    fakes = Fakes(card, total)
    with replaced_cuda(fakes.gpu):
        yield fakes


@contextmanager
def fake_cuda(card: Card = H100, total: int = 2**40) -> Iterator[Fakes]:
    """Run the code of a `with` block on a fake GPU."""
    with fake_gpu(card, total) as fakes, new_fake_mode(), fakes.memory, fakes.trace:
        yield fakes
