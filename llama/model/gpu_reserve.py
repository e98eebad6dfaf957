"""Calculates the GPU memory that the torch engine needs in addition to weights and the key/value cache.

The formulas follow the tensors that a step creates. The tests compare them with a run of the whole engine on
fake CUDA tensors. Nothing has been measured on a GPU. Knows arithmetic on a model's configuration; knows
nothing about settings, files or devices.

Joining the weights of a layer at load time takes up to 1.1 GB for the 70B. It is not reserved, because it
ends before the cache is created.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from llama.model.quantized_layers import Quantization

MOST_PROMPT_TOKENS = 1024
"""The most prompt tokens that a step reads on a GPU. This number is a guess."""

SHORTEST_GRAPH = 256
"""Without flash attention, the length in tokens of the shortest cache for which a graph is captured."""

# The bytes of device memory that a driver before version 550 takes for each kernel launch in a graph; newer
# ones take less. Source: "Dynamic Shape Support" in PyTorch's documentation of CUDAGraph Trees.
_BYTES_PER_LAUNCH = 64 * 2**10

# Kernel launches of a decode step: of each layer, by precision, and of everything else. The first term is at
# least the largest number that the fake run counts, over all GPUs and dtypes. The last one is for 16-bit
# products, which cuBLAS may split into two launches.
_LAUNCHES_PER_LAYER: dict[Quantization, int] = {
    "none": 21 + 4,
    "fp8": 44,
    "int8": 54,
    "nf4": 26 + 7 + 7,  # the second term: bitsandbytes may unpack each weight first
}
_OTHER_LAUNCHES = 16 + 1

# cuBLAS has a workspace per stream, of 32 MiB on Hopper and 8 MiB on other GPUs. That of cuBLASLt has 1 MiB.
# Source: torch 2.11's CublasHandlePool.cpp and CUDABlas.cpp. There are two streams: one for steps, and one on
# which torch captures graphs.
_WORKSPACES = 2 * (32 + 1) * 2**20

# torch's allocator takes at least a segment of 2 MiB for small tensors and one of 20 MiB for larger ones
# (kSmallBuffer and kLargeBuffer in its CUDACachingAllocator.cpp). There are two pools: the ordinary one and
# that of the graphs.
_SEGMENTS = 2 * 22 * 2**20

# Bytes per logit while filtered logits are sampled: 48 for tensors (in the fake run), and 32 for two buffers
# of keys and values, 8 bytes each, in which torch sorts.
_SAMPLER = 80
# Bytes that the sampler keeps per row and token of the vocabulary: a flag and a count.
_COUNTS = 1 + 4
# Bytes that it keeps per row and position: a random number in float64.
_UNIFORM = 8


@dataclass(frozen=True, slots=True)
class GpuReserve:
    """Bytes of one GPU that are neither weights nor cache."""

    activations: int
    """Tensors of the largest prefill, of the sampler and of the rotary tables."""
    graphs: int
    """Captured graphs, and the tensors of the decode step, which stay in the graphs' own pool."""
    workspaces: int
    """Workspaces of cuBLAS, and the allocator's rounding and fragmentation."""

    @property
    def total(self) -> int:
        return self.without_graphs + self.graphs

    @property
    def without_graphs(self) -> int:
        """The bytes to reserve if no graphs are captured."""
        return self.activations + self.workspaces


def gpu_reserve(
    config: LlamaConfig,
    quantization: Quantization,
    dtype: torch.dtype,
    *,
    rows: int,
    context: int,
    flash_attention: bool,
) -> GpuReserve:
    """Calculate the reserve for at most `rows` requests of `context` tokens. Activations are in `dtype`."""
    sizes = _Sizes(config, quantization, dtype)
    tokens = min(MOST_PROMPT_TOKENS, context)
    prefill, decode = sizes.step(tokens, rows), sizes.step(rows, rows)
    if not flash_attention:
        prefill += sizes.masks(tokens, context)
        decode += sizes.scores(rows, context)
    sampler = rows * config.vocab_size * _SAMPLER
    kept = rows * (config.vocab_size * _COUNTS + context * _UNIFORM)
    tables = 2 * context * config.head_dim * dtype.itemsize
    batch_sizes, lengths = graph_shapes(rows, context, flash_attention=flash_attention)
    # Every graph keeps its logits, in float32.
    logits = sum(batch_sizes) * len(lengths) * config.vocab_size * 4
    launches = len(batch_sizes) * len(lengths) * launches_of_step(config, quantization)
    return GpuReserve(
        activations=max(prefill, sampler) + kept + tables,
        graphs=decode + logits + launches * _BYTES_PER_LAUNCH,
        # The largest tensor may need new memory although as much is free in pieces.
        workspaces=_WORKSPACES + _SEGMENTS + sizes.largest(tokens),
    )


def launches_of_step(config: LlamaConfig, quantization: Quantization) -> int:
    """The number of kernel launches of a decode step, at most."""
    return int(config.num_hidden_layers * _LAUNCHES_PER_LAYER[quantization] + _OTHER_LAUNCHES)


def graph_shapes(rows: int, context: int, *, flash_attention: bool) -> tuple[list[int], list[int]]:
    """Return the batch sizes and the lengths for which decode steps are captured.

    With flash attention, every step reads each row to its own length, so the only length is `context`.
    """
    return doubling(1, rows), [context] if flash_attention else doubling(SHORTEST_GRAPH, context)


def doubling(first: int, last: int) -> list[int]:
    """Return sizes from `first` to `last`, each twice as large as the one before, except the last.

    A step of any other size uses the graph of the next larger one. The 70B with 32 rows needs 6 batch sizes
    and 5 lengths. If the lengths from 1,024 on increased by 512, it would need 9 lengths, and less memory
    would be left for the key/value cache.
    """
    result = [min(first, last)]
    while result[-1] < last:
        result.append(min(2 * result[-1], last))
    return result


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Sizes of the tensors of a step. Activations are in `dtype`."""

    config: LlamaConfig
    quantization: Quantization
    dtype: torch.dtype

    @property
    def element(self) -> int:
        """Bytes of one activation."""
        return self.dtype.itemsize

    def step(self, tokens: int, results: int) -> int:
        """Bytes of the tensors that are alive at the peak of a step that returns this many rows of logits."""
        hidden, mlp, queries, keys = self._widths
        # Kept during the whole step: the hidden states and the two tensors whose sum they are, the latest
        # output of attention, and the latest input of the down-projection.
        carried = self.element * (3 * hidden + queries + mlp)
        # An unpacked weight, and the outputs of the layers that have the same input.
        unpacking = self._unpacked + tokens * self.element * max(2 * mlp, queries + 2 * keys)
        logits = results * self.config.vocab_size * (self.element + 4)  # as computed, and in float32
        return int(tokens * carried + max(tokens * self._attention, tokens * self._mlp, unpacking) + logits)

    def masks(self, tokens: int, context: int) -> int:
        """Bytes that the masks of a prefill take without flash attention.

        Each of the query heads that share a KV head has its own copy of the mask.
        """
        heads, kv_heads = int(self.config.num_attention_heads), int(self.config.num_key_value_heads)
        masks = tokens * (context + 8) * (heads // kv_heads * self.element + 1)
        if self.config.head_dim % 8 == 0 and self.dtype is not torch.bfloat16:
            return masks
        # torch has no fused kernel for such heads, nor for bfloat16 before Ampere. It computes scores,
        # masked scores and attention weights in float32.
        return masks + tokens * context * heads * 3 * 4

    def scores(self, rows: int, context: int) -> int:
        """Bytes that the scores of a decode step take without flash attention: scores and attention weights
        in float32, the same weights in `dtype`, and the mask in float32."""
        heads, kv_heads = int(self.config.num_attention_heads), int(self.config.num_key_value_heads)
        return rows * context * (heads * (4 + 4 + self.element) + kv_heads * 4)

    def largest(self, tokens: int) -> int:
        """Bytes of the largest tensor: gates and up-projections, or an unpacked weight."""
        return max(tokens * 2 * self._widths[1] * self.element, self._unpacked)

    @property
    def _widths(self) -> tuple[int, int, int, int]:
        """The widths of hidden states, of the MLP, of all queries and of all keys."""
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        return (
            config.hidden_size,
            config.intermediate_size,
            heads * config.head_dim,
            kv_heads * config.head_dim,
        )

    @property
    def _attention(self) -> int:
        """Bytes per token in attention: the projections and the intermediate results of rotating queries and
        keys; or the rotated ones, and four copies of the queries that flash attention makes."""
        _, _, queries, keys = self._widths
        return 6 * self.element * (queries + keys)

    @property
    def _mlp(self) -> int:
        """Bytes per token in the MLP."""
        hidden, mlp, queries, _ = self._widths
        widest = max(mlp, queries)
        gated = 4 * self.element * widest  # gates, up-projections, the activated gates and the product
        match self.quantization:
            case "none" | "nf4":
                return gated
            case "fp8":  # the gates and their input in FP8; or an input, its quotient, and its FP8 numbers
                return max(gated + hidden, (self.element + 4 + 1) * widest)
            case "int8":  # the gates, and the up-projections in int32, in float16 and in `dtype`
                return max(gated, (2 * self.element + 4 + 2) * widest) + hidden

    @property
    def _unpacked(self) -> int:
        """Bytes of the largest weight, if bitsandbytes unpacks it: 448 MiB for the 70B in NF4. See
        `_dequant_linear_fallback` in its backends/cuda/ops.py."""
        hidden, mlp, queries, _ = self._widths
        return self.element * hidden * max(mlp, queries) if self.quantization == "nf4" else 0
