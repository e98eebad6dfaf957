"""Attention on a CPU with compiled kernels.

A decode step needs no mask, because a kernel reads each row only to the row's own length. For a chunk of a
prompt, a kernel writes the cache and torch computes the attention. Knows the arguments of the kernels; knows
nothing about how they compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.torch_engine.attention import Attend, Attention, Chunk
from llama.torch_engine.cpu_compiler import Kernels, as_array
from llama.torch_engine.kv_cache import KVCache
from llama.torch_engine.layers import ModelParts

Array = Any  # a numpy array


class CompiledAttention(Attention):
    """Attention over a cache on the CPU."""

    def __init__(self, parts: ModelParts, cache: KVCache, kernels: Kernels) -> None:
        self._parts, self._layers, self._kernels = parts, cache.layers, kernels
        self._arrays = [as_array(layer) for layer in cache.layers]
        self._tables = as_array(parts.cos[:, 0]), as_array(parts.sin[:, 0])
        self._scale = np.float32(parts.scale)
        self._width = parts.heads * cache.layers[0].shape[-1]

    def decode(self, positions: Tensor, angles: Tensor, length: int) -> Attend:  # noqa: ARG002
        return partial(self._decode, as_array(positions), as_array(angles))

    def prefill(self, chunks: Sequence[Chunk]) -> Attend:
        return partial(self._prefill, chunks, [self._bias(chunk) for chunk in chunks])

    def _bias(self, chunk: Chunk) -> Tensor | None:
        """Return what is added to the scores of a chunk [N, end]: -inf at later positions, 0 elsewhere.

        Return None if the chunk starts at the first position: torch can then mask without a bias.
        """
        if chunk.start == 0:
            return None
        bias = torch.full((len(chunk.token_ids), chunk.end), float("-inf"), dtype=self._parts.dtype)
        return bias.triu_(chunk.start + 1)

    def _decode(self, positions: Array, angles: Array, index: int, qkv: Tensor) -> Tensor:
        attended = torch.empty(len(qkv), self._width, dtype=qkv.dtype)
        self._kernels.attend_rows(
            as_array(qkv),
            *self._tables,
            angles,
            self._arrays[index],
            positions,
            self._scale,
            as_array(attended),
        )
        return attended

    def _prefill(
        self, chunks: Sequence[Chunk], biases: Sequence[Tensor | None], index: int, qkv: Tensor
    ) -> Tensor:
        queries = torch.empty(len(qkv), self._width, dtype=qkv.dtype)
        lengths = [len(chunk.token_ids) for chunk in chunks]
        attended = []
        for chunk, bias, projected, rotated in zip(
            chunks, biases, torch.split(qkv, lengths), torch.split(queries, lengths), strict=True
        ):
            self._kernels.store_chunk(
                as_array(projected),
                *self._tables,
                chunk.first_angle(self._parts),
                self._arrays[index],
                chunk.row,
                chunk.start,
                as_array(rotated),
            )
            attended.append(
                self._attend_chunk(self._layers[index][:, chunk.row, :, : chunk.end], rotated, bias)
            )
        return torch.cat(attended)

    def _attend_chunk(self, contents: Tensor, queries: Tensor, bias: Tensor | None) -> Tensor:
        """Attend from queries [N, heads x D] to the contents of a row, [2, KV heads, end, D]."""
        keys, values = contents.to(queries.dtype)
        attended = F.scaled_dot_product_attention(
            queries.view(len(queries), self._parts.heads, -1).transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=bias,
            is_causal=bias is None,
            scale=self._parts.scale,
            enable_gqa=True,
        )
        return attended[0].transpose(0, 1).flatten(1)
