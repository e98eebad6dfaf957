"""One step of the model: our own forward pass over the layers of `layers.py`.

Keeps the next token and position of every row on the device, so that a decode step needs nothing from the
host. Knows tensors, positions and rows; knows nothing about requests. The tests compare it with
`model(ids).logits`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from llama.errors import EngineNotStarted
from llama.torch_engine.attention import Chunk, attention_for
from llama.torch_engine.cuda_graphs import StepGraphs
from llama.torch_engine.layers import Layer, ModelParts
from llama.torch_engine.rows import Rows

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Takes a layer's cache, queries [N, heads, D], and keys and values [N, 2, KV heads, D]; returns
[N, heads x D]."""

_ROUND_UP = 16  # the number of cached positions is rounded up to a multiple of this, so that few shapes occur


class Runner:
    """Runs prefill and decode steps.

    N is the number of tokens in a step, V the vocabulary size, and D the head dimension.
    """

    def __init__(self, parts: ModelParts, rows: Rows) -> None:
        self._parts, self._cache = parts, rows.cache
        self._attention = attention_for(rows.cache, parts.heads, parts.scale)
        self._last = rows.cache.shape.length - 1  # the position of rows that are not decoding
        self._tokens = rows.tensor(dtype=torch.long)
        self._positions = rows.tensor(dtype=torch.long, idle=self._last)
        # Added to a position to get its index in the rotary tables.
        self._stretches = rows.tensor(dtype=torch.long)
        _, _, self._kv_heads, _, self._head_dim = rows.cache.layers[0].shape
        self._graphs: StepGraphs | None = None

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Read each chunk into its row, and return the logits of each chunk's last token: [chunks, V]."""
        metadata = self._attention.prefill_metadata(chunks)
        positions = torch.cat([self._rotary_positions(chunk) for chunk in chunks])
        token_ids = torch.cat([chunk.token_ids for chunk in chunks])
        ends = torch.tensor(metadata.lengths, device=positions.device).cumsum(0) - 1
        attend = partial(self._attention.prefill, metadata)
        return self._logits(self._hidden(token_ids, positions, attend)[ends])

    @torch.inference_mode()
    def decode(self, batch_size: int, longest: int) -> Tensor:
        """Decode one token for each of the first `batch_size` rows, and return the logits [batch_size, V].

        The logits of rows that are not decoding are meaningless. `longest` is the number of tokens in the
        longest row, including its new token.
        """
        length = min(-(-longest // _ROUND_UP) * _ROUND_UP, self._cache.shape.length)
        step = self._graphs or self._step
        logits = step(batch_size, length)
        self._positions[:batch_size].add_(1).clamp_(max=self._last)
        return logits

    @torch.inference_mode()
    def feed(self, first: int, tokens: Tensor) -> None:
        """Set the tokens [B] that the next step reads in the rows from `first` on."""
        self._tokens[first : first + len(tokens)] = tokens.clamp(min=0)

    def start_decoding(self, row: int, position: int, *, stretched: bool = False) -> None:
        """Let a row take part in decoding from `position` on. `stretched` is as in `Chunk`."""
        self._positions[row] = position
        self._stretches[row] = stretched * self._parts.stretched_from

    @torch.inference_mode()
    def capture(self) -> None:
        """Let decode steps replay CUDA graphs from now on. Raises EngineNotStarted or OutOfMemoryError."""
        try:
            torch.cuda.set_device(self._parts.device)  # for this thread, which captures the graphs
            self._graphs = StepGraphs(self._step, self._cache.shape.rows, self._cache.shape.length)
        except Exception as error:
            # An error during a capture causes an error of the capture itself; the first one has the reason.
            cause = error.__context__ or error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            # Do not continue without graphs: torch's allocator and stream are still in the failed capture.
            raise EngineNotStarted(
                f"a decode step cannot be captured as a CUDA graph ({cause}); set LLAMA_CUDA_GRAPHS to 0, "
                "which is slower, or choose another LLAMA_QUANTIZATION"
            ) from error

    def _rotary_positions(self, chunk: Chunk) -> Tensor:
        """Return the indices of a chunk's tokens in the rotary tables: [N]."""
        first = chunk.start + chunk.stretched * self._parts.stretched_from
        return torch.arange(first, first + len(chunk.token_ids), device=self._parts.device)

    def _step(self, batch_size: int, length: int) -> Tensor:
        positions = self._positions[:batch_size]
        attend = partial(self._attention.decode, self._attention.decode_metadata(positions, length))
        if self._parts.stretched_from:
            positions = positions + self._stretches[:batch_size]
        return self._logits(self._hidden(self._tokens[:batch_size], positions, attend))

    def _hidden(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Return the hidden states after the last layer, before the final norm: [N, hidden]."""
        parts = self._parts
        cos, sin = parts.cos[positions], parts.sin[positions]
        x: Tensor = parts.embedding(token_ids).to(parts.dtype)
        for layer, cached in zip(parts.layers, self._cache.layers, strict=True):
            queries, keys_values = self._projected(layer, x, cos, sin)
            x = x + layer.output(attend(cached, queries, keys_values).to(x.dtype))
            x = x + layer.mlp(x)
        return x

    def _projected(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries [N, heads, D], and keys and values [N, 2, KV heads, D], in the type of the cache.

        Queries and keys are rotated by their positions.
        """
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
    """Apply rotary position embedding to [N, heads, D], in the half-split layout of transformers."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
