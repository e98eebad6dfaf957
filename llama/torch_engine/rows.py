"""Everything that belongs to a row of the batch: keys and values, the next token, sampling parameters.

One object moves a request from one row to another, so that nothing of it is left behind. Knows tensors whose
first dimension is the row; knows nothing of what they mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama.torch_engine.kv_cache import KVCache


class Rows:
    """The cache, and the tensors that `tensor` has made."""

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
        """A new tensor [rows, *shape] that moves with its requests. `idle`: what a row without a request must
        hold; None if that does not matter."""
        size = (self.cache.shape.rows, *shape)
        assert idle is None or fill == 0  # one of them is the first content
        tensor = torch.full(size, fill if idle is None else idle, dtype=dtype, device=self.cache.device)
        self._tensors.append(tensor)
        if idle is not None:
            self._idle.append((tensor, idle))
        return tensor

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` keys and values of a row to another."""
        self.cache.copy(source, target, count)

    def swap(self, source: int, target: int, count: int) -> None:
        """Move a request to another row, and the first `count` keys and values there to its own."""
        self.cache.swap(source, target, count)
        self._move_state(source, target)

    def move(self, source: int, target: int, count: int) -> None:
        """Move a request with `count` keys and values to another row, whose contents are lost."""
        self.cache.copy(source, target, count)
        self._move_state(source, target)

    def clear(self, row: int, count: int) -> None:
        """Overwrite the first `count` keys and values of a row, which may not be finite."""
        self.cache.clear(row, count)

    def vacate(self, row: int) -> None:
        """The row has no request any more. Its keys and values stay."""
        for tensor, value in self._idle:
            tensor[row] = value

    def _move_state(self, source: int, target: int) -> None:
        for tensor in self._tensors:
            tensor[target] = tensor[source]
