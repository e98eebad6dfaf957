"""Attention on a GPU with torch's flash attention, which reads each row only to the row's own length.

The public functions of torch 2.11 cannot do this: `scaled_dot_product_attention` needs a mask, and reads
every row to the length of the longest one. So this module calls the operator that they are built on. It needs
16-bit numbers and a GPU of compute capability 8.0 or later (`model/placement.py` decides). Not run on a GPU.
Knows projections, rotary tables and the layout of the cache; knows nothing about requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from llama.torch_engine.attention import Attend, Attention, Chunk, rotary_indices, rotary_rows, rotated
from llama.torch_engine.kv_cache import KVCache
from llama.torch_engine.layers import ModelParts


class _Step(NamedTuple):
    """What all layers of a step need. B is the number of rows in the step, N the number of tokens."""

    cos: Tensor
    sin: Tensor
    cells: Tensor
    """[N] int64: where the keys and the values of each token are stored, counted in positions from the start
    of the cache."""
    query_starts: Tensor
    """[B + 1] int32: the index of the first token of each row in the step, and N."""
    row_starts: Tensor
    """[B + 1] int32: where each row starts in the cache, counted in positions. The last entry is not used."""
    lengths: Tensor
    """[B] int32: the number of positions to read in each row. No position is read if it is 0."""
    most_queries: int
    """No row has more tokens than this in the step."""
    most_keys: int
    """No entry of `lengths` is larger than this."""


class FlashAttention(Attention):
    """Attention over a cache whose layers are tensors [2, rows, length, KV heads, D]."""

    def __init__(self, parts: ModelParts, cache: KVCache) -> None:
        self._parts, self._layers = parts, cache.layers
        _, rows, self._length, self._kv_heads, _ = cache.layers[0].shape
        self._counts = torch.arange(rows + 1, dtype=torch.int32, device=cache.device)
        self._row_starts = self._counts * self._length

    def prefill(self, chunks: Sequence[Chunk]) -> Attend:
        angles = torch.cat([rotary_indices(chunk, self._parts) for chunk in chunks])
        starts = [chunk.row * self._length for chunk in chunks]
        cells = [
            torch.arange(start + chunk.start, start + chunk.end, device=angles.device)
            for start, chunk in zip(starts, chunks, strict=True)
        ]
        counts = [0, *(len(chunk.token_ids) for chunk in chunks)]
        query_starts, row_starts, lengths = (
            torch.tensor(values, dtype=torch.int32, device=angles.device)
            for values in (counts, [*starts, 0], [chunk.end for chunk in chunks])
        )
        step = _Step(
            *rotary_rows(self._parts, angles),
            cells=torch.cat(cells),
            query_starts=query_starts.cumsum(0, dtype=torch.int32),
            row_starts=row_starts,
            lengths=lengths,
            most_queries=max(counts),
            most_keys=max(chunk.end for chunk in chunks),
        )
        return partial(self._attend, step)

    def decode(self, positions: Tensor, angles: Tensor, length: int) -> Attend:  # noqa: ARG002
        batch_size = len(positions)
        step = _Step(
            *rotary_rows(self._parts, angles),
            cells=self._row_starts[:batch_size] + positions,
            query_starts=self._counts[: batch_size + 1],
            row_starts=self._row_starts[: batch_size + 1],
            # 0 for rows that are not decoding, because their position is the last one of the row.
            lengths=((positions + 1) % self._length).int(),
            most_queries=1,
            most_keys=self._length,
        )
        return partial(self._attend, step)

    def _attend(self, step: _Step, index: int, qkv: Tensor) -> Tensor:
        queries, keys, values = rotated(qkv, step.cos, step.sin, self._kv_heads)
        cached_keys, cached_values = self._layers[index].flatten(1, 2)  # [rows x length, KV heads, D]
        cached_keys.index_copy_(0, step.cells, keys)
        cached_values.index_copy_(0, step.cells, values)
        attended: Tensor
        # Causal means that the last token of a row attends to all positions that its length includes, and
        # each earlier token to one position less than the next.
        attended, *_ = torch.ops.aten._flash_attention_forward.default(
            queries,
            cached_keys,
            cached_values,
            step.query_starts,
            step.row_starts,
            step.most_queries,
            step.most_keys,
            0.0,  # dropout
            True,  # causal
            False,  # no debug mask
            scale=self._parts.scale,
            seqused_k=step.lengths,
        )
        return attended.flatten(1)
