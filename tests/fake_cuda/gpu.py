"""A GPU that does not exist: its free memory is calculated from fake tensors, and its graphs are counted.

Knows the GPU's memory and graphs; `patches.py` knows which functions of torch have to be replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fake_cuda.kernel_costs import H100, Card
from fake_cuda.memory import Memory
from fake_cuda.trace import Trace, place_in_engine

BYTES_PER_LAUNCH = 64 * 2**10
"""What a captured launch takes with drivers before 550, by torch's documentation of CUDA graph trees."""


class FakeGpu:
    """What `patches.replaced_cuda` lets torch report. Without `memory` and `trace`, no memory is in use."""

    def __init__(
        self,
        card: Card = H100,
        total: int = 2**40,
        *,
        memory: Memory | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.name, self.capability = card.name, card.capability
        self.total = total
        self.graphs = self.replays = self.synchronized = 0
        self.graph_memory = 0
        """The bytes of all graphs, without the tensors of their steps."""
        self.pool = 0
        """The bytes that the steps of the graphs share."""
        self.reads: list[str] = []
        """The places that read results."""
        self.token = 5
        """The value of every token that is read."""
        self._memory, self._trace = memory, trace

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        used = self._memory.now if self._memory else 0
        return self.total - used - self.pool - self.graph_memory, self.total

    @contextmanager
    def capture(self, graph: Any, pool: Any) -> Iterator[None]:
        before = self._memory.start_phase() if self._memory else 0
        launched = self._trace.count if self._trace else 0
        yield
        self.graphs += 1
        if self._memory:
            self.pool = max(self.pool, self._memory.peak - before)
        if self._trace:
            self.graph_memory += BYTES_PER_LAUNCH * (self._trace.count - launched)

    def replay(self) -> None:
        self.replays += 1

    def synchronize(self, device: object = None) -> None:
        self.synchronized += 1

    def read(self, tensor: Tensor) -> list[int]:
        self.reads.append(place_in_engine())
        return [self.token] * len(tensor)
