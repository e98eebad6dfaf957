"""Everything that belongs to a row of the batch: keys and values, the next token, sampling parameters.

A request moves to another row in one call, so that all of its state moves together. Knows tensors whose first
dimension is the row; knows nothing about what they mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama.torch_engine.kv_cache import KVCache


class Rows:
    """The key/value cache, and the tensors that `tensor` has created."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self._tensors: list[Tensor] = []
        self._idle: list[tuple[Tensor, float]] = []

    def tensor(
        self,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        fill: float = 0,
        idle: float | None = None,
    ) -> Tensor:
        """Create a tensor [rows, *shape] whose contents move with the requests.

        Rows without a request always contain `idle`, unless it is None.
        """
        size = (self.cache.shape.rows, *shape)
        assert idle is None or fill == 0  # each sets the initial value
        tensor = torch.full(size, fill if idle is None else idle, dtype=dtype, device=self.cache.device)
        self._tensors.append(tensor)
        if idle is not None:
            self._idle.append((tensor, idle))
        return tensor

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` keys and values of a row to another row."""
        self.cache.copy(source, target, count)

    def swap(self, source: int, target: int, count: int) -> None:
        """Move a request to row `target`, and exchange the first `count` keys and values of both rows."""
        self.cache.swap(source, target, count)
        self._move_state(source, target)

    def move(self, source: int, target: int, count: int) -> None:
        """Move a request with `count` keys and values to another row, and overwrite that row's contents."""
        self.cache.copy(source, target, count)
        self._move_state(source, target)

    def clear(self, row: int, count: int) -> None:
        """Overwrite the first `count` keys and values of a row, because they may not be finite."""
        self.cache.clear(row, count)

    def vacate(self, row: int) -> None:
        """Record that a row no longer has a request. Its keys and values stay."""
        for tensor, value in self._idle:
            tensor[row : row + 1] = value  # a slice, because assigning to an element waits for the GPU

    def _move_state(self, source: int, target: int) -> None:
        for tensor in self._tensors:
            tensor[target] = tensor[source]
