"""One step of the model: our own forward pass over the layers of `layers.py`.

Keeps the next token and position of every row on the device, so that a decode step needs nothing from the
host. Knows tensors, positions and rows; knows nothing about requests. The tests compare it with
`model(ids).logits`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama.errors import EngineNotStarted
from llama.model.gpu_errors import is_out_of_memory
from llama.model.gpu_reserve import graph_shapes
from llama.torch_engine.attention import Attend, Attention, Chunk, torch_attention
from llama.torch_engine.cpu_attention import CompiledAttention
from llama.torch_engine.cpu_compiler import Kernels
from llama.torch_engine.cuda_graphs import StepGraphs
from llama.torch_engine.flash_attention import FlashAttention
from llama.torch_engine.kv_cache import KVCache
from llama.torch_engine.layers import ModelParts
from llama.torch_engine.operators import CompiledOperators, Operators, TorchOperators
from llama.torch_engine.rows import Rows

_ROUND_UP = 16  # the number of cached positions is rounded up to a multiple of this, so that few shapes occur


class Runner:
    """Runs prefill and decode steps.

    N is the number of tokens in a step, V the vocabulary size, and D the head dimension.
    """

    def __init__(self, parts: ModelParts, rows: Rows, kernels: Kernels | None = None) -> None:
        """Without `kernels`, torch computes everything."""
        self._parts, self._cache = parts, rows.cache
        self._attention = _attention(parts, rows.cache, kernels)
        self._operators: Operators = CompiledOperators(kernels) if kernels else TorchOperators()
        self._last = rows.cache.shape.length - 1  # the position of rows that are not decoding
        self._tokens = rows.tensor(dtype=torch.long)
        self._positions = rows.tensor(dtype=torch.long, idle=self._last)
        # Added to a position to get its index in the rotary tables.
        self._stretches = rows.tensor(dtype=torch.long)
        self._graphs: StepGraphs | None = None

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Read each chunk into its row, and return the logits of each chunk's last token: [chunks, V]."""
        # Before the layers are launched, because this copy to a GPU waits for everything that was launched.
        lengths = torch.tensor([len(chunk.token_ids) for chunk in chunks], device=self._parts.device)
        ends = lengths.cumsum(0) - 1
        attend = self._attention.prefill(chunks)
        hidden = self._hidden(torch.cat([chunk.token_ids for chunk in chunks]), attend)
        return self._logits(*(part[ends] for part in hidden))

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
        # Slices: to assign a number to a single element, torch would copy it to the GPU and wait for it.
        self._positions[row : row + 1] = position
        self._stretches[row : row + 1] = stretched * self._parts.stretched_from

    @torch.inference_mode()
    def run_largest_steps(self, most: int) -> Tensor:
        """Read up to `most` tokens at the end of a row, and decode in all rows. Return the logits [rows, V].

        The cache is empty before and afterwards.
        """
        rows, length = self._cache.shape.rows, self._cache.shape.length
        token_ids = torch.zeros(min(most, length), dtype=torch.long, device=self._parts.device)
        self.prefill([Chunk(0, length - len(token_ids), token_ids)])
        logits = self.decode(rows, length)
        for row in range(rows):
            self._cache.clear(row, length if row == 0 else 0)  # what was written may not be finite
        return logits

    @torch.inference_mode()
    def capture(self) -> None:
        """Let decode steps replay CUDA graphs from now on.

        Raises EngineNotStarted, or an error that `is_out_of_memory` recognizes.
        """
        shape = self._cache.shape
        sizes = graph_shapes(shape.rows, shape.length, flash_attention=self._cache.by_position)
        try:
            torch.cuda.set_device(self._parts.device)  # for this thread, which captures the graphs
            self._graphs = StepGraphs(self._step, *sizes)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # An error during a capture causes an error of the capture itself; the first one has the reason.
            cause = error.__context__ or error
            # Do not continue without graphs: torch's allocator and stream are still in the failed capture.
            raise EngineNotStarted(
                f"a decode step cannot be captured as a CUDA graph ({cause}); set LLAMA_CUDA_GRAPHS to 0, "
                "which is slower, or choose another LLAMA_QUANTIZATION"
            ) from error

    def _step(self, batch_size: int, length: int) -> Tensor:
        positions = self._positions[:batch_size]
        angles = positions + self._stretches[:batch_size] if self._parts.stretched_from else positions
        attend = self._attention.decode(positions, angles, length)
        return self._logits(*self._hidden(self._tokens[:batch_size], attend))

    def _hidden(self, token_ids: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """Return two terms, each [N, hidden], whose sum is the hidden states of the last layer."""
        parts, operators = self._parts, self._operators
        x: Tensor = parts.embedding(token_ids).to(parts.dtype)
        delta = torch.zeros_like(x)
        for index, layer in enumerate(parts.layers):
            x, normed = operators.add_and_norm(x, delta, layer.attention_norm)
            attended = attend(index, operators.linear(layer.qkv, normed))
            x, normed = operators.add_and_norm(x, operators.linear(layer.output, attended), layer.mlp_norm)
            gated = operators.gated(layer, operators.linear(layer.gate_up, normed))
            delta = operators.linear(layer.down, gated)
        return x, delta

    def _logits(self, x: Tensor, delta: Tensor) -> Tensor:
        _, normed = self._operators.add_and_norm(x, delta, self._parts.norm)
        return self._operators.linear(self._parts.head, normed).float()


def _attention(parts: ModelParts, cache: KVCache, kernels: Kernels | None) -> Attention:
    if kernels:
        return CompiledAttention(parts, cache, kernels)
    return FlashAttention(parts, cache) if cache.by_position else torch_attention(parts, cache)
