"""Attention of one layer over the key/value cache, for prompt chunks and for decode steps.

N is the number of tokens in a step, B the number of rows, and D the head dimension. Values that are the same
for every layer of a step are computed once, into an object (`PrefillMetadata` or `DecodeMetadata`) that is
passed to every layer. Knows the layout of the cache; knows nothing about projections, rotary tables or
requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.torch_engine.kv_cache import KVCache


class Chunk(NamedTuple):
    """Consecutive tokens of a prompt, which one step reads into a row."""

    row: int
    start: int
    """The number of prompt tokens that the row already contains."""
    token_ids: Tensor
    """[N]"""
    stretched: bool = False
    """Whether the request may grow beyond `ModelParts.stretched_from` tokens."""

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class PrefillMetadata:
    """What every layer needs in order to read the chunks of one step."""

    chunks: Sequence[Chunk]
    masks: Sequence[Tensor]
    """For each chunk, the positions that its queries attend to: [query heads per KV head x N, end] bool."""

    @property
    def lengths(self) -> list[int]:
        return [len(chunk.token_ids) for chunk in self.chunks]


@dataclass(frozen=True, slots=True)
class DecodeMetadata:
    """What every layer needs in order to decode one token in each of the first B rows."""

    length: int
    """The number of cached positions that are read in every row."""
    bias: Tensor
    """Added to the scores: -inf at positions that a row does not attend to."""
    cells: Tensor
    """Where to write the new keys and values: indices into a layer's cache viewed as [-1, D], as a tensor
    [B x 2 x KV heads]."""


class Attention(ABC):
    """Attention over a cache whose layers are tensors [2, rows, KV heads, length, D].

    Queries are [N, heads, D]. Keys and values are passed as one tensor, [N, 2, KV heads, D]. The result is
    [N, heads x D].
    """

    def __init__(self, cache: KVCache, heads: int, scale: float) -> None:
        """`heads` is the number of query heads. `scale` multiplies the scores."""
        self._dtype, self._scale = cache.dtype, scale
        _, rows, self._kv_heads, length, self._head_dim = cache.layers[0].shape
        self._group = heads // self._kv_heads
        self._positions = torch.arange(length, device=cache.device)
        starts = torch.arange(2 * rows * self._kv_heads, device=cache.device) * length
        self._starts = starts.view(2, rows, self._kv_heads).transpose(0, 1)

    def prefill_metadata(self, chunks: Sequence[Chunk]) -> PrefillMetadata:
        """Return what `prefill` needs for these chunks; it is the same for every layer."""
        return PrefillMetadata(chunks, [self._mask(chunk) for chunk in chunks])

    def prefill(
        self, metadata: PrefillMetadata, layer: Tensor, queries: Tensor, keys_values: Tensor
    ) -> Tensor:
        """Write each chunk into its row and attend causally to the row's contents."""
        lengths = metadata.lengths
        return torch.cat(
            [
                self._prefill_chunk(layer, *chunk)
                for chunk in zip(
                    metadata.chunks,
                    metadata.masks,
                    torch.split(queries, lengths),
                    torch.split(keys_values, lengths),
                    strict=True,
                )
            ]
        )

    def decode_metadata(self, positions: Tensor, length: int) -> DecodeMetadata:
        """Return what `decode` needs; it is the same for every layer.

        `positions` [B] are the positions of the new tokens in their rows.
        """
        hidden = self._positions[:length] > positions[:, None]
        bias = torch.zeros_like(hidden, dtype=self._dtype).masked_fill_(hidden, float("-inf"))
        cells = (self._starts[: len(positions)] + positions[:, None, None]).flatten()
        return DecodeMetadata(length, self._shaped_bias(bias), cells)

    def decode(self, metadata: DecodeMetadata, layer: Tensor, queries: Tensor, keys_values: Tensor) -> Tensor:
        """Write one token into each of the first B rows and attend to the row's contents."""
        batch_size = len(queries)
        layer.view(-1, self._head_dim).index_copy_(0, metadata.cells, keys_values.view(-1, self._head_dim))
        keys, values = layer[:, :batch_size, :, : metadata.length]  # [B, KV heads, length, D]
        # Query heads that share a KV head are passed as additional queries, so no key or value is repeated.
        grouped = queries.reshape(batch_size, self._kv_heads, self._group, self._head_dim)
        return self._attend(grouped, keys, values, metadata.bias).reshape(batch_size, -1)

    def _mask(self, chunk: Chunk) -> Tensor:
        visible = self._positions[: chunk.end] <= self._positions[chunk.start : chunk.end, None]
        return visible.repeat(self._group, 1)

    def _prefill_chunk(
        self, layer: Tensor, chunk: Chunk, mask: Tensor, queries: Tensor, keys_values: Tensor
    ) -> Tensor:
        layer[:, chunk.row, :, chunk.start : chunk.end] = keys_values.permute(1, 2, 0, 3)
        keys, values = layer[:, chunk.row, :, : chunk.end]
        # Query heads that share a KV head are passed as additional queries, so no key or value is repeated.
        grouped = queries.view(len(queries), self._kv_heads, self._group, self._head_dim).permute(1, 2, 0, 3)
        attended = F.scaled_dot_product_attention(
            grouped.flatten(1, 2)[None], keys[None], values[None], attn_mask=mask, scale=self._scale
        )
        return attended.view(grouped.shape).permute(2, 0, 1, 3).flatten(1)

    @abstractmethod
    def _shaped_bias(self, bias: Tensor) -> Tensor:
        """Reshape a bias [B, length] for `_attend`."""

    @abstractmethod
    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Attend from queries [B, KV heads, query heads per KV head, D] to keys and values
        [B, KV heads, length, D].

        The result has as many elements as the queries, in the same order. Its shape may differ.
        """


class FusedAttention(Attention):
    """Attention that decodes with torch's fused kernel."""

    def _shaped_bias(self, bias: Tensor) -> Tensor:
        return bias[:, None, None]

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=self._scale)


class TwoProductAttention(Attention):
    """Attention that decodes with two batched matrix products."""

    def _shaped_bias(self, bias: Tensor) -> Tensor:
        return bias.repeat_interleave(self._kv_heads, dim=0)[:, None]  # [B x KV heads, 1, length]

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        scores = torch.baddbmm(bias, queries.flatten(0, 1), keys.transpose(1, 2), alpha=self._scale)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
        return torch.bmm(weights, values)


def attention_for(cache: KVCache, heads: int, scale: float) -> Attention:
    """Return the attention that decodes faster with this cache (`Placement.cache_dtype` has the figures)."""
    if cache.device.type == "cuda":
        # On Hopper, torch prefers cuDNN, which builds a new plan for every prompt length.
        torch.backends.cuda.enable_cudnn_sdp(False)
    fused = cache.device.type == "cpu" and cache.dtype is torch.bfloat16
    return (FusedAttention if fused else TwoProductAttention)(cache, heads, scale)
