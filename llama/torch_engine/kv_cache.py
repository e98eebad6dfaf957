"""The key/value cache: one preallocated tensor a layer, divided into rows of one context each.

Knows shapes and bytes; knows nothing of requests (`scheduler.py` gives rows out) nor of what is worth
keeping (`prefix_cache.py`).
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig

from llama.errors import DoesNotFit
from llama.model.precision_plan import bytes_per_token

SMALLEST_CONTEXT = 64


@dataclass(frozen=True, slots=True)
class CacheShape:
    """How a memory budget is divided: `rows` requests at once, `length` tokens each."""

    rows: int
    length: int


def fit_cache(config: LlamaConfig, dtype: torch.dtype, *, budget: int, context: int, rows: int) -> CacheShape:
    """At most `rows` requests of `context` tokens in `budget` bytes; a shorter context when not even
    one fits. Raises DoesNotFit when that would be too short to be of use."""
    per_token = bytes_per_token(config, dtype)
    length = min(context, budget // per_token)
    if length < min(context, SMALLEST_CONTEXT):
        raise DoesNotFit(
            f"the key/value cache may take {budget} bytes and one token needs {per_token}; "
            f"give it at least {per_token * SMALLEST_CONTEXT} bytes (LLAMA_CACHE_MEMORY) or a smaller model"
        )
    return CacheShape(rows=min(rows, budget // (per_token * length)), length=length)


class KVCache:
    """`layers[i]`: [2 (keys, values), rows, KV heads, length, head_dim], zeros at first.

    A request's last token is never read by the model, so the last position of a row is free. A step writes
    there for rows that do not decode.
    """

    def __init__(
        self, config: LlamaConfig, shape: CacheShape, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (2, shape.rows, config.num_key_value_heads, shape.length, config.head_dim)
        self.shape = shape
        self.dtype, self.device = dtype, device
        self.layers = [_zeros(size, dtype, device) for _ in range(config.num_hidden_layers)]

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` positions of a row to another."""
        for layer in self.layers:
            layer[:, target, :, :count] = layer[:, source, :, :count]

    def swap(self, a: int, b: int, count: int) -> None:
        """Exchange the first `count` positions of two rows."""
        for layer in self.layers:
            kept = layer[:, a, :, :count].clone()
            layer[:, a, :, :count] = layer[:, b, :, :count]
            layer[:, b, :, :count] = kept

    def clear(self, row: int, count: int) -> None:
        """Overwrite the first `count` positions of a row, and the last. Between healthy requests that is not
        needed, since what a mask hides has weight zero. But zero times NaN is NaN, so a failed request's keys
        and values must go."""
        for layer in self.layers:
            layer[:, row, :, :count] = 0
            layer[:, row, :, -1] = 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU, map the memory lazily: `torch.zeros` would commit all of it at once. Use small pages: with
    huge ones, the first 25 tokens of a row took a second, in which the kernel wrote zeros around them."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
