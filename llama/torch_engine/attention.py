"""Attention of one layer over the key/value cache, for prompt chunks and for decode steps.

N is the number of tokens in a step, B the number of rows, and D the head dimension. `prefill` and `decode`
prepare what all layers need, once per step. They return a function (`Attend`), which the runner calls for
every layer. `flash_attention.py` has a faster implementation for GPUs, and `cpu_attention.py` one for CPUs.
Knows projections, rotary tables and the layout of the cache; knows nothing about requests.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.torch_engine.kv_cache import KVCache
from llama.torch_engine.layers import ModelParts

Attend = Callable[[int, Tensor], Tensor]
"""Takes the index of a layer, and its projections [N, (heads + 2 x KV heads) x D]: queries, keys and values.
Writes the keys and values to the cache, and returns the attention of the queries, [N, heads x D]."""


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

    def first_angle(self, parts: ModelParts) -> int:
        """The index of the first token in the rotary tables. The indices of the other tokens follow."""
        return self.start + self.stretched * parts.stretched_from


class Attention(Protocol):
    """Attention over a key/value cache."""

    def prefill(self, chunks: Sequence[Chunk]) -> Attend:
        """Return a function that attends causally from each chunk to the contents of its row.

        The function takes the projections of all chunks, one chunk after the other.
        """

    def decode(self, positions: Tensor, angles: Tensor, length: int) -> Attend:
        """Return a function that attends from a new token in each of the first B rows to the row's contents.

        `positions` [B] are the positions of the new tokens in their rows. All are less than `length`, except
        those of rows that are not decoding. `angles` [B] are the tokens' indices in the rotary tables.
        """


def rotary_indices(chunk: Chunk, parts: ModelParts) -> Tensor:
    """Return the indices of a chunk's tokens in the rotary tables, [N]."""
    first = chunk.first_angle(parts)
    return torch.arange(first, first + len(chunk.token_ids), device=parts.device)


def rotary_rows(parts: ModelParts, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of the tables of cosines and sines for tokens [N], as `rotated` takes them."""
    sin = parts.sin[indices]
    sin[..., : sin.shape[-1] // 2].neg_()  # once per step, instead of negating numbers in every layer
    return parts.cos[indices], sin


def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [N, heads, D], keys [N, KV heads, D] and values [N, KV heads, D] from projections.

    Queries and keys are rotated, in the half-split layout of transformers. `cos` and `sin` are [N, 1, D]; the
    first half of each sine is negated.
    """
    heads = qkv.view(len(qkv), -1, cos.shape[-1])
    turned = heads[:, :-kv_heads]
    first, second = turned.chunk(2, dim=-1)
    turned = torch.addcmul(turned * cos, torch.cat((second, first), dim=-1), sin)
    return turned[:, :-kv_heads], turned[:, -kv_heads:], heads[:, -kv_heads:]


class TorchAttention(Attention):
    """Attention with torch's operators, on any device. The cache's layers are [2, rows, KV heads, length, D].

    Keys and values are converted to the type of the queries if the cache has another one.
    """

    def __init__(self, parts: ModelParts, cache: KVCache) -> None:
        self._parts, self._layers = parts, cache.layers
        _, rows, self._kv_heads, length, self._head_dim = cache.layers[0].shape
        self._group = parts.heads // self._kv_heads
        self._positions = torch.arange(length, device=cache.device)
        starts = torch.arange(2 * rows * self._kv_heads, device=cache.device) * length
        self._starts = starts.view(2, rows, self._kv_heads).transpose(0, 1)

    def prefill(self, chunks: Sequence[Chunk]) -> Attend:
        angles = torch.cat([rotary_indices(chunk, self._parts) for chunk in chunks])
        tables = rotary_rows(self._parts, angles)
        return partial(self._prefill, chunks, tables, [self._bias(chunk) for chunk in chunks])

    def decode(self, positions: Tensor, angles: Tensor, length: int) -> Attend:
        hidden = self._positions[:length] > positions[:, None]
        bias = torch.zeros_like(hidden, dtype=self._parts.dtype).masked_fill_(hidden, float("-inf"))
        cells = (self._starts[: len(positions)] + positions[:, None, None]).flatten()
        tables = rotary_rows(self._parts, angles)
        return partial(self._decode, tables, self._shaped_bias(bias), cells, length)

    def _bias(self, chunk: Chunk) -> Tensor:
        """Return what is added to the scores of a chunk, [query heads per KV head x N, end]: -inf at later
        positions, 0 elsewhere.

        The start of each row is a multiple of 8 numbers. Otherwise, torch's kernel for GPUs would copy the
        bias in every layer.
        """
        hidden = self._positions[: chunk.end] > self._positions[chunk.start : chunk.end, None]
        size = (self._group, len(chunk.token_ids), -(-chunk.end // 8) * 8)
        bias = torch.zeros(size, dtype=self._parts.dtype, device=self._parts.device)[..., : chunk.end]
        return bias.masked_fill_(hidden, float("-inf")).flatten(0, 1)

    def _prefill(
        self,
        chunks: Sequence[Chunk],
        tables: tuple[Tensor, Tensor],
        biases: Sequence[Tensor],
        index: int,
        qkv: Tensor,
    ) -> Tensor:
        queries, keys_values = self._rotated(qkv, *tables)
        lengths = [len(chunk.token_ids) for chunk in chunks]
        return torch.cat(
            [
                self._prefill_chunk(self._layers[index], *chunk)
                for chunk in zip(
                    chunks,
                    biases,
                    torch.split(queries, lengths),
                    torch.split(keys_values, lengths),
                    strict=True,
                )
            ]
        )

    def _prefill_chunk(
        self, layer: Tensor, chunk: Chunk, bias: Tensor, queries: Tensor, keys_values: Tensor
    ) -> Tensor:
        layer[:, chunk.row, :, chunk.start : chunk.end] = keys_values.permute(1, 2, 0, 3)
        keys, values = layer[:, chunk.row, :, : chunk.end].to(queries.dtype)
        # Query heads that share a KV head are passed as additional queries, so no key or value is repeated.
        grouped = queries.view(len(queries), self._kv_heads, self._group, self._head_dim).permute(1, 2, 0, 3)
        attended = F.scaled_dot_product_attention(
            grouped.flatten(1, 2)[None], keys[None], values[None], attn_mask=bias, scale=self._parts.scale
        )
        return attended.view(grouped.shape).permute(2, 0, 1, 3).flatten(1)

    def _decode(
        self, tables: tuple[Tensor, Tensor], bias: Tensor, cells: Tensor, length: int, index: int, qkv: Tensor
    ) -> Tensor:
        queries, keys_values = self._rotated(qkv, *tables)
        layer, batch_size = self._layers[index], len(queries)
        layer.view(-1, self._head_dim).index_copy_(0, cells, keys_values.view(-1, self._head_dim))
        keys, values = layer[:, :batch_size, :, :length].to(queries.dtype)  # [B, KV heads, length, D]
        # Query heads that share a KV head are passed as additional queries, so no key or value is repeated.
        grouped = queries.reshape(batch_size, self._kv_heads, self._group, self._head_dim)
        return self._attend(grouped, keys, values, bias).reshape(batch_size, -1)

    def _rotated(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries [N, heads, D], and keys and values [N, 2, KV heads, D] in the type of the cache."""
        queries, keys, values = rotated(qkv, cos, sin, self._kv_heads)
        return queries, torch.stack((keys, values), dim=1).to(self._layers[0].dtype)

    @abstractmethod
    def _shaped_bias(self, bias: Tensor) -> Tensor:
        """Reshape a bias [B, length] for `_attend`."""

    @abstractmethod
    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Attend from queries [B, KV heads, query heads per KV head, D] to keys and values
        [B, KV heads, length, D].

        The result has as many elements as the queries, in the same order. Its shape may differ.
        """


class FusedAttention(TorchAttention):
    """Attention that decodes with torch's fused kernel."""

    def _shaped_bias(self, bias: Tensor) -> Tensor:
        return bias[:, None, None]

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=self._parts.scale)


class TwoProductAttention(TorchAttention):
    """Attention that decodes with two batched matrix products."""

    def _shaped_bias(self, bias: Tensor) -> Tensor:
        return bias.float().repeat_interleave(self._kv_heads, dim=0)[:, None]  # [B x KV heads, 1, length]

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        factors, scale = (queries.flatten(0, 1), keys.transpose(1, 2)), self._parts.scale
        if queries.dtype is torch.float32:
            scores = torch.baddbmm(bias, *factors, alpha=scale)
        else:
            # Scores that are rounded to 16 bits would make the largest weights wrong by up to 5 %. A product
            # whose type differs from that of its factors exists on GPUs only.
            scores = torch.add(bias, torch.bmm(*factors, out_dtype=torch.float32), alpha=scale)
        return torch.bmm(torch.softmax(scores, dim=-1).to(values.dtype), values)


def torch_attention(parts: ModelParts, cache: KVCache) -> TorchAttention:
    """Return the class of the two above that decodes faster with this model.

    On a Xeon with AMX, the fused kernel is faster in bfloat16. For 32 requests of 192 tokens, one layer of
    the benchmark model takes 1.3 ms with it, and 2.9 ms with two products. On an EPYC without AMX, it takes
    5.0 instead of 3.1 ms, but its sums are in float32.
    """
    if cache.device.type == "cuda":
        # On Hopper, torch prefers cuDNN, which builds a new plan for every prompt length.
        torch.backends.cuda.enable_cudnn_sdp(False)
    fused = cache.device.type == "cpu" and parts.dtype is torch.bfloat16
    return (FusedAttention if fused else TwoProductAttention)(parts, cache)
