"""One step of the model: a forward of our own over the layers of `layers.py`.

Keeps, on the device, the next token and position of every row of the batch, so that a decode step needs
nothing from the host. Knows tensors, positions and rows; knows nothing of requests. Its reference in
the tests is `model(ids).logits`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.errors import EngineNotStarted
from llama.torch_engine.cuda_graphs import Step, StepGraphs
from llama.torch_engine.kv_cache import KVCache
from llama.torch_engine.layers import Layer, Parts

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A layer's cache, queries [N, heads, D], keys and values [N, 2, KV heads, D] to [N, heads x D]."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [B, KV heads, queries of each, D], keys and values [B, KV heads, length, D] to what queries are."""

_ROUND_UP = 16  # cached positions are read in multiples, so that few shapes occur


class Chunk(NamedTuple):
    """Some tokens of a prompt, to be read into a row."""

    row: int
    start: int
    """How much of the row is there already."""
    token_ids: Tensor
    """[N]"""
    stretched: bool = False
    """Whether its request may end beyond `Parts.stretched_from` tokens."""

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


class Runner:
    """N is the number of tokens in a step, B of rows, V the vocabulary, D the head dimension."""

    def __init__(self, parts: Parts, cache: KVCache) -> None:
        self._parts, self._cache = parts, cache
        self._nowhere = cache.plan.length - 1  # the position of rows that have nothing to say
        rows = cache.plan.rows
        self._tokens = torch.zeros(rows, dtype=torch.long, device=parts.device)
        self._positions = torch.full_like(self._tokens, self._nowhere)
        # What is added to a position to find it in the rotary tables.
        self._stretches = torch.zeros_like(self._tokens)
        _, _, self._kv_heads, length, self._head_dim = cache.layers[0].shape
        starts = torch.arange(2 * rows * self._kv_heads, device=parts.device) * length
        self._starts = starts.view(2, rows, self._kv_heads).transpose(0, 1)
        self._all_positions = torch.arange(cache.plan.length, device=parts.device)
        # Of one query a request, in bfloat16 on a CPU the fused kernel is the quickest (`Parts.cache_dtype`
        # has the figures); in float32 and on a GPU two plain products are.
        fused = parts.device.type == "cpu" and cache.dtype is torch.bfloat16
        self._attention = self._fused if fused else self._two_products
        self._replay: Step = self._step
        if parts.device.type == "cuda":
            # On Hopper torch prefers cuDNN, which plans anew for every length of a prompt.
            torch.backends.cuda.enable_cudnn_sdp(False)

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Put each chunk into its row, after what is there. Logits of the last token of each: [chunks, V]."""
        lengths = [len(chunk.token_ids) for chunk in chunks]
        positions = torch.cat(
            [
                self._all_positions[chunk.start : chunk.end] + chunk.stretched * self._parts.stretched_from
                for chunk in chunks
            ]
        )
        visible = [self._visible(chunk) for chunk in chunks]

        def attend(cached: Tensor, queries: Tensor, keys_values: Tensor) -> Tensor:
            return torch.cat(
                [
                    self._read(cached, chunk, mask, *tokens)
                    for chunk, mask, *tokens in zip(
                        chunks,
                        visible,
                        torch.split(queries, lengths),
                        torch.split(keys_values, lengths),
                        strict=True,
                    )
                ]
            )

        token_ids = torch.cat([chunk.token_ids for chunk in chunks])
        ends = torch.tensor(lengths, device=positions.device).cumsum(0) - 1
        return self._logits(self._hidden(token_ids, positions, attend)[ends])

    def _visible(self, chunk: Chunk) -> Tensor:
        """Which positions each query of a KV head sees: [groups x N, end]."""
        mask = self._all_positions[: chunk.end] <= self._all_positions[chunk.start : chunk.end, None]
        return mask.repeat(self._parts.heads // self._kv_heads, 1)

    def _read(
        self, cached: Tensor, chunk: Chunk, visible: Tensor, queries: Tensor, keys_values: Tensor
    ) -> Tensor:
        """Attention of one chunk [N] over its own row; `visible` [groups x N, end]. To [N, heads x D]."""
        cached[:, chunk.row, :, chunk.start : chunk.end] = keys_values.permute(1, 2, 0, 3)
        keys, values = cached[:, chunk.row, :, : chunk.end]
        # Query heads that share a KV head become more queries of it, so that nothing is repeated.
        count, kv_heads = len(queries), len(keys)
        grouped = queries.view(count, kv_heads, -1, queries.shape[-1]).permute(1, 2, 0, 3)
        groups = grouped.shape[1]
        attended = F.scaled_dot_product_attention(
            grouped.flatten(1, 2)[None],
            keys[None],
            values[None],
            attn_mask=visible,
            scale=self._parts.scale,
        )
        return attended.view(kv_heads, groups, count, -1).permute(2, 0, 1, 3).flatten(1)

    @torch.inference_mode()
    def decode(self, height: int, longest: int) -> Tensor:
        """One token for each of the first `height` rows, of which none is longer than `longest` with it.
        Logits [height, V]; those of rows that hold no request mean nothing."""
        length = min(-(-longest // _ROUND_UP) * _ROUND_UP, self._cache.plan.length)
        logits = self._replay(height, length)
        self._positions[:height].add_(1).clamp_(max=self._nowhere)
        return logits

    @torch.inference_mode()
    def feed(self, first: int, tokens: Tensor) -> None:
        """The tokens [B] that the rows from `first` on are to read next."""
        self._tokens[first : first + len(tokens)] = tokens.clamp(min=0)

    def place(self, row: int, position: int, *, stretched: bool = False) -> None:
        """Let a row take part in decoding from `position` on. `stretched`: as in `Chunk`."""
        self._positions[row] = position
        self._stretches[row] = stretched * self._parts.stretched_from

    def move(self, source: int, target: int) -> None:
        """Let a row's request go on in another."""
        for tensor in (self._tokens, self._positions, self._stretches):
            tensor[target] = tensor[source]

    def remove(self, row: int) -> None:
        """A row has no request any more."""
        self._positions[row] = self._nowhere

    @torch.inference_mode()
    def capture(self) -> None:
        """Replay decode steps from CUDA graphs from now on. Raises EngineNotStarted and OutOfMemoryError."""
        try:
            torch.cuda.set_device(self._parts.device)  # this thread's: graphs are captured there
            self._replay = StepGraphs(self._step, self._cache.plan.rows, self._cache.plan.length)
        except Exception as error:
            # What goes wrong within a capture ends in an error of the capture itself: the first says why.
            cause = error.__context__ or error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            # Not a step without graphs instead: torch's allocator and stream are left as in the capture.
            raise EngineNotStarted(
                f"a step cannot be captured as a CUDA graph ({cause}); set LLAMA_CUDA_GRAPHS to 0, which is "
                "slower, or another LLAMA_QUANTIZATION"
            ) from error

    def _step(self, height: int, length: int) -> Tensor:
        positions = self._positions[:height]
        hidden = self._all_positions[:length] > positions[:, None]
        bias = torch.zeros_like(hidden, dtype=self._cache.dtype).masked_fill_(hidden, float("-inf"))
        attention = self._attention(bias)
        places = self._places(positions)

        def attend(cached: Tensor, queries: Tensor, keys_values: Tensor) -> Tensor:
            cached.view(-1, self._head_dim).index_copy_(0, places, keys_values.view(-1, self._head_dim))
            keys, values = cached[:, :height, :, :length]  # [height, KV heads, length, D]
            # Query heads that share a KV head are so many queries of it.
            grouped = queries.reshape(height, self._kv_heads, -1, self._head_dim)
            return attention(grouped, keys, values).reshape(height, -1)

        if self._parts.stretched_from:
            positions = positions + self._stretches[:height]
        return self._logits(self._hidden(self._tokens[:height], positions, attend))

    def _fused(self, bias: Tensor) -> Attention:
        """Attention with `bias` [B, length] on the scores."""
        mask = bias[:, None, None]
        return lambda queries, keys, values: F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=self._parts.scale
        )

    def _two_products(self, bias: Tensor) -> Attention:
        """As `_fused`."""
        bias = bias.repeat_interleave(self._kv_heads, dim=0)[:, None]  # [height x KV heads, 1, length]

        def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            keys, values = keys.flatten(0, 1), values.flatten(0, 1)
            scores = torch.baddbmm(bias, queries.flatten(0, 1), keys.transpose(1, 2), alpha=self._parts.scale)
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
            return torch.bmm(weights, values)

        return attention

    def _places(self, positions: Tensor) -> Tensor:
        """Where the keys and values of the first rows go in a layer's cache seen as one list of heads, in
        the order [B, 2, KV heads] of what is to be written."""
        return (self._starts[: len(positions)] + positions[:, None, None]).flatten()

    def _hidden(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states after the last layer, not yet normalised: [N, hidden]."""
        parts = self._parts
        cos, sin = parts.cos[positions], parts.sin[positions]
        x: Tensor = parts.embedding(token_ids).to(parts.dtype)
        for layer, cached in zip(parts.layers, self._cache.layers, strict=True):
            queries, keys_values = self._projected(layer, x, cos, sin)
            x = x + layer.output(attend(cached, queries, keys_values).to(x.dtype))
            x = x + layer.mlp(x)
        return x

    def _projected(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [N, heads, D], keys and values [N, 2, KV heads, D], rotated by their positions, as the
        cache holds them."""
        kv_heads = self._kv_heads
        heads = layer.qkv(layer.attention_norm(x)).view(len(x), -1, self._head_dim)
        turned = _rotated(heads[:, :-kv_heads], cos, sin)
        queries, keys = turned[:, :-kv_heads], turned[:, -kv_heads:]
        keys_values = torch.stack((keys, heads[:, -kv_heads:]), dim=1)
        return queries.to(self._cache.dtype), keys_values.to(self._cache.dtype)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._parts.head(self._parts.norm(hidden))
        return logits.float()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [N, heads, D] in the half-split layout of transformers."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
