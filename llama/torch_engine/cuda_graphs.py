"""CUDA graphs of the decode step: one for each batch size and length of the cache, replayed whole.

Without them a step of 80 layers waits for its 2,000 launches. Knows shapes and memory of the device;
knows nothing of what a step computes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

Step = Callable[[int, int], Tensor]
"""Batch size and length to logits [batch size, V]; reads and writes tensors that stay where they are."""

_SHORTEST = 256


def doubling(first: int, last: int) -> list[int]:
    """Sizes that are captured, up to `last`: a smaller one is filled up to the next.

    30 graphs for the 70B with 32 rows; lengths by 512 from 1,024 on would be 54, at the cache's expense.
    """
    result = [min(first, last)]
    while result[-1] < last:
        result.append(min(2 * result[-1], last))
    return result


class StepGraphs:
    """A step, captured at every batch size and length; call it with any."""

    def __init__(self, step: Step, rows: int, context: int) -> None:
        """Takes about a tenth of a second a graph. After an error torch is not fit to compute any more: it
        ends neither the capture's hold on the allocator nor its stream."""
        self._batch_sizes, self._lengths = doubling(1, rows), doubling(_SHORTEST, context)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the others find their memory in its pool.
        for shape in reversed(list(product(self._batch_sizes, self._lengths))):
            self._graphs[shape] = _captured(step, shape, pool)

    def __call__(self, batch_size: int, length: int) -> Tensor:
        at_least = bisect_left(self._batch_sizes, batch_size), bisect_left(self._lengths, length)
        graph, logits = self._graphs[self._batch_sizes[at_least[0]], self._lengths[at_least[1]]]
        graph.replay()
        return logits[:batch_size]


def _captured(step: Step, shape: tuple[int, int], pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    step(*shape)  # kernels are chosen and workspaces made before anything is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        logits = step(*shape)
    return graph, logits
