"""The key/value cache: one preallocated tensor per layer, divided into rows of one context each.

Knows shapes and bytes; knows nothing about requests (`scheduler.py` assigns rows to them) or about which
contents to keep (`prefix_cache.py`).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import LlamaConfig

from llama.errors import DoesNotFit
from llama.model.placement import Placement
from llama.model.precision_plan import bytes_per_token

SMALLEST_CONTEXT = 64


@dataclass(frozen=True, slots=True)
class CacheShape:
    """How a memory budget is divided: `rows` concurrent requests of `length` tokens each."""

    rows: int
    length: int


def fit_cache(config: LlamaConfig, dtype: torch.dtype, *, budget: int, context: int, rows: int) -> CacheShape:
    """Return a shape of at most `budget` bytes, for at most `rows` requests of `context` tokens.

    If not even one such request fits, the context is shorter. Raises DoesNotFit if it would be shorter than
    SMALLEST_CONTEXT.
    """
    per_token = bytes_per_token(config, dtype)
    length = min(context, budget // per_token)
    if length < min(context, SMALLEST_CONTEXT):
        raise DoesNotFit(
            f"the key/value cache is limited to {budget} bytes, but the shortest context of "
            f"{SMALLEST_CONTEXT} tokens needs {per_token * SMALLEST_CONTEXT} bytes; set LLAMA_CACHE_MEMORY "
            "to at least that many bytes, or use a smaller model"
        )
    return CacheShape(rows=min(rows, budget // (per_token * length)), length=length)


class KVCache:
    """`layers[i]` is [2 (keys, values), rows, KV heads, length, head_dim], or, with `by_position`,
    [2, rows, length, KV heads, head_dim]. All numbers are zero at first.

    The model never reads a request's last token, so no request uses the last position of a row. A decode step
    writes there for rows that are not decoding.
    """

    def __init__(
        self,
        config: LlamaConfig,
        shape: CacheShape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        by_position: bool = False,
    ) -> None:
        """Flash attention needs the layout `by_position`."""
        heads, length = config.num_key_value_heads, shape.length
        row = (length, heads) if by_position else (heads, length)
        self.shape, self.by_position = shape, by_position
        self.dtype, self.device = dtype, device
        self.layers = [
            _zeros((2, shape.rows, *row, config.head_dim), dtype, device)
            for _ in range(config.num_hidden_layers)
        ]

    @classmethod
    def for_placement(cls, config: LlamaConfig, shape: CacheShape, placement: Placement) -> Self:
        """Create the cache of a model that was loaded with `placement`."""
        dtype, device = placement.cache_dtype, placement.device
        return cls(config, shape, dtype, device, by_position=placement.flash_attention)

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` positions of a row to another row."""
        for layer in self._positions():
            layer[:, target, :count] = layer[:, source, :count]

    def swap(self, a: int, b: int, count: int) -> None:
        """Exchange the first `count` positions of two rows."""
        for layer in self._positions():
            kept = layer[:, a, :count].clone()
            layer[:, a, :count] = layer[:, b, :count]
            layer[:, b, :count] = kept

    def clear(self, row: int, count: int) -> None:
        """Set the first `count` positions of a row, and its last position, to zero.

        This is needed only after a failed request. Masked positions have weight zero, so finite values of an
        earlier request have no effect, but zero times NaN is NaN.
        """
        for layer in self._positions():
            layer[:, row, :count] = 0
            layer[:, row, -1] = 0

    def _positions(self) -> Iterator[Tensor]:
        """Yield each layer as [2, rows, length, KV heads, head_dim]."""
        for layer in self.layers:
            yield layer if self.by_position else layer.transpose(2, 3)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of zeros.

    On a CPU, map the memory lazily: `torch.zeros` would commit all of it at once. Use small pages: with huge
    ones, the first 25 tokens of a row took one second, because the operating system cleared the memory around
    them.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
