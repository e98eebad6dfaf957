"""CUDA graphs of the decode step, one for each captured batch size and cache length.

Without a graph, a step of 80 layers is limited by the time that its 1,500 to 4,200 kernel launches take
(calculated). `model/gpu_reserve.py` decides which shapes are captured. Knows shapes and device memory; knows
nothing about what a step computes. Not run on a GPU.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

Step = Callable[[int, int], Tensor]
"""Takes a batch size and a length, and returns logits [batch size, V]. It must read and write tensors whose
addresses do not change."""


class StepGraphs:
    """A step that was captured at several batch sizes and lengths, and can be called with any."""

    def __init__(self, step: Step, batch_sizes: Sequence[int], lengths: Sequence[int]) -> None:
        """Capture a graph for each batch size and length, which takes an estimated 0.1 s per graph (not
        measured). Both must be sorted. A step of any other shape uses the graph of the next larger one.

        After an error, torch cannot be used any more: its allocator and stream stay in the failed capture.
        """
        self._batch_sizes, self._lengths = batch_sizes, lengths
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool = torch.cuda.graph_pool_handle()
        # Largest first: the other graphs then reuse its memory from the pool.
        for shape in reversed(list(product(batch_sizes, lengths))):
            self._graphs[shape] = _captured(step, shape, pool)
        for graph, _ in self._graphs.values():
            graph.replay()  # now, because the first replay may allocate memory
        torch.cuda.synchronize()

    def __call__(self, batch_size: int, length: int) -> Tensor:
        at_least = bisect_left(self._batch_sizes, batch_size), bisect_left(self._lengths, length)
        graph, logits = self._graphs[self._batch_sizes[at_least[0]], self._lengths[at_least[1]]]
        graph.replay()
        return logits[:batch_size]


def _captured(step: Step, shape: tuple[int, int], pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    step(*shape)  # chooses kernels and allocates workspaces before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        logits = step(*shape)
    return graph, logits
