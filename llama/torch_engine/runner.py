"""One step of the model: a forward of our own over the layers of `layers.py`.

Keeps, on the device, the next token and position of every row of the batch, so that a decode step needs
nothing from the host. Knows tensors, positions and rows; knows nothing of requests. Its reference in
the tests is `model(ids).logits`.
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
"""A layer's cache, queries [N, heads, D], keys and values [N, 2, KV heads, D] to [N, heads x D]."""

_ROUND_UP = 16  # cached positions are read in multiples, so that few shapes occur


class Runner:
    """N is the number of tokens in a step, V the vocabulary, D the head dimension."""

    def __init__(self, parts: ModelParts, rows: Rows) -> None:
        self._parts, self._cache = parts, rows.cache
        self._attention = attention_for(rows.cache, parts.heads, parts.scale)
        self._last = rows.cache.shape.length - 1  # the position of rows that do not decode
        self._tokens = rows.tensor(dtype=torch.long)
        self._positions = rows.tensor(dtype=torch.long, idle=self._last)
        # What is added to a position to find it in the rotary tables.
        self._stretches = rows.tensor(dtype=torch.long)
        _, _, self._kv_heads, _, self._head_dim = rows.cache.layers[0].shape
        self._graphs: StepGraphs | None = None

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Put each chunk into its row, after what is there. Logits of the last token of each: [chunks, V]."""
        metadata = self._attention.prefill_metadata(chunks)
        positions = torch.cat([self._rotary_positions(chunk) for chunk in chunks])
        token_ids = torch.cat([chunk.token_ids for chunk in chunks])
        ends = torch.tensor(metadata.lengths, device=positions.device).cumsum(0) - 1
        attend = partial(self._attention.prefill, metadata)
        return self._logits(self._hidden(token_ids, positions, attend)[ends])

    @torch.inference_mode()
    def decode(self, batch_size: int, longest: int) -> Tensor:
        """One token for each of the first `batch_size` rows, of which none is longer than `longest` with it.
        Logits [batch_size, V]; those of rows that do not decode mean nothing."""
        length = min(-(-longest // _ROUND_UP) * _ROUND_UP, self._cache.shape.length)
        step = self._graphs or self._step
        logits = step(batch_size, length)
        self._positions[:batch_size].add_(1).clamp_(max=self._last)
        return logits

    @torch.inference_mode()
    def feed(self, first: int, tokens: Tensor) -> None:
        """Set the tokens [B] that the rows from `first` on read next."""
        self._tokens[first : first + len(tokens)] = tokens.clamp(min=0)

    def start_decoding(self, row: int, position: int, *, stretched: bool = False) -> None:
        """Let a row take part in decoding from `position` on. `stretched`: as in `Chunk`."""
        self._positions[row] = position
        self._stretches[row] = stretched * self._parts.stretched_from

    @torch.inference_mode()
    def capture(self) -> None:
        """Replay decode steps from CUDA graphs from now on. Raises EngineNotStarted and OutOfMemoryError."""
        try:
            torch.cuda.set_device(self._parts.device)  # this thread's: graphs are captured there
            self._graphs = StepGraphs(self._step, self._cache.shape.rows, self._cache.shape.length)
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

    def _rotary_positions(self, chunk: Chunk) -> Tensor:
        """Where a chunk's tokens are in the rotary tables: [N]."""
        first = chunk.start + chunk.stretched * self._parts.stretched_from
        return torch.arange(first, first + len(chunk.token_ids), device=self._parts.device)

    def _step(self, batch_size: int, length: int) -> Tensor:
        positions = self._positions[:batch_size]
        attend = partial(self._attention.decode, self._attention.decode_metadata(positions, length))
        if self._parts.stretched_from:
            positions = positions + self._stretches[:batch_size]
        return self._logits(self._hidden(self._tokens[:batch_size], positions, attend))

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
