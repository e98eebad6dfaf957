"""Compare attention and quantized linear layers on a device with float64 on the CPU.

For attention, rows have very different lengths, and the cache is filled with NaN first, so that a kernel that
reads beyond a row's own length gives NaN. Knows attention, its cache and how each precision stores a weight;
knows nothing about requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.random_model import placement_of
from benchmarks.gpu.results import CheckFailed, Measurements, Skipped
from benchmarks.tables import counted
from llama.model.placement import Placement
from llama.model.quantized_layers import Quantization, quantize, stored_shape, to_stored
from llama.torch_engine.attention import Attention, Chunk, torch_attention
from llama.torch_engine.flash_attention import FlashAttention
from llama.torch_engine.kv_cache import CacheShape, KVCache
from llama.torch_engine.layers import ModelParts, take_apart
from llama.torch_engine.linears import Scratch, packed_together

_KV_HEADS = 2
LENGTH = 2048
"""The context of the configurations."""
# The number of prompt tokens that each step reads, by row. A prompt may be read in several steps, and a step
# may read a single token. Decode steps follow, for these rows and for one more, which is not decoding.
_CHUNKS = ({0: 1200, 1: 1, 2: 65}, {0: 300, 3: 129}, {1: 1})
_SMALL_CHUNKS = ({0: 60, 1: 1, 2: 17}, {0: 20, 3: 33}, {1: 1})
_DECODE_STEPS = 2
# Numbers are rounded to the dtype several times: rotated queries and keys, attention weights, and the result.
# Sums are in float32. A wrong position or head gives a relative error of about 1.
_ROUNDINGS = 3
_SUMS = 1e-5
_POISON_WITH_MASK = 100.0  # not NaN: a masked position has weight zero, and zero times NaN is NaN
# Rows of the input of a linear layer. Libraries choose other kernels for other numbers of rows.
_LINEAR_ROWS = (1, 4, 16, 17, 32, 300)
_TOLERANCE: dict[Quantization, float] = {
    "fp8": 2.0**-4,  # inputs are rounded to 3 bits of mantissa, which changes each by at most this fraction
    # Inputs are rounded to 255 levels up to a row's largest value, which is about 4.5 standard deviations.
    "int8": 0.02,
    "nf4": 2.0**-7,  # inputs are not rounded, but weights and results are, to 8 bits
}


@dataclass(frozen=True, slots=True)
class _Rows:
    """All projections [N, heads + 2 x KV heads, D] of each row so far, in float64 on the CPU."""

    parts: ModelParts
    projections: list[Tensor]

    def expected(self, row: int, projections: Tensor) -> Tensor:
        """Add projections to a row. Return the attention of their queries, [N, heads, D]."""
        count = len(projections)
        self.projections[row] = torch.cat((self.projections[row], projections))
        seen = self.projections[row]
        heads, keys, values = torch.split(seen, [self.parts.heads, _KV_HEADS, _KV_HEADS], dim=1)
        cos, sin = (table.cpu().double()[: len(seen)] for table in (self.parts.cos, self.parts.sin))
        queries, keys = _rotated(heads, cos, sin)[-count:], _rotated(keys, cos, sin)
        keys, values = (t.repeat_interleave(self.parts.heads // _KV_HEADS, dim=1) for t in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * self.parts.scale
        later = torch.arange(len(seen)) > torch.arange(len(seen) - count, len(seen))[:, None]
        weights = scores.masked_fill(later, -math.inf).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, values)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def check_kernels(measurements: Measurements, device: torch.device, *, small: bool) -> None:
    """Run all checks. `small` makes them fast on a CPU."""
    for dtype, head_dim, group in product(("bfloat16", "float16"), (64, 128), (1, 8)):
        name = f"attention in {dtype}, head_dim {head_dim}, {group} query heads per KV head"
        measurements.take(name, partial(_check_attention_on, device, dtype, head_dim, group, small))
    for quantization in _TOLERANCE:
        name = f"linear layers in {quantization}"
        measurements.take(name, partial(_check_linear, device, quantization, small))


def _check_attention_on(
    device: torch.device, dtype: str, head_dim: int, group: int, small: bool
) -> dict[str, Any]:
    config = attention_config(head_dim, group)
    return check_attention(config, placement_of(config, device, "none", dtype, LENGTH), small=small)


def check_attention(config: LlamaConfig, placement: Placement, *, small: bool) -> dict[str, Any]:
    """Check prompt chunks and decode steps with a configuration of `attention_config`.

    Return the largest relative error of a head's result. Raises CheckFailed.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(placement.device, placement.dtype).requires_grad_(False)
    parts = take_apart(model, placement)
    cache = KVCache.for_placement(config, CacheShape(6, LENGTH), placement)
    attention: Attention = (
        FlashAttention(parts, cache) if cache.by_position else torch_attention(parts, cache)
    )
    errors = attention_errors(attention, parts, cache, small=small)
    tolerance = _ROUNDINGS * torch.finfo(placement.dtype).eps + _SUMS
    return {
        "kernel": type(attention).__name__,
        **_accepted({f"step {step}": error for step, error in enumerate(errors)}, tolerance),
    }


def attention_errors(attention: Attention, parts: ModelParts, cache: KVCache, *, small: bool) -> list[float]:
    """Return the largest relative error of each step.

    It is NaN, or large, if a step has read beyond a row's length.
    """
    for layer in cache.layers:
        layer.fill_(math.nan if cache.by_position else _POISON_WITH_MASK)
    size = (0, parts.heads + 2 * _KV_HEADS, cache.layers[0].shape[-1])
    rows = _Rows(parts, [torch.zeros(size, dtype=torch.float64) for _ in range(4)])
    with torch.inference_mode():
        prompts = [
            _prefill_error(attention, rows, counts) for counts in (_SMALL_CHUNKS if small else _CHUNKS)
        ]
        return [*prompts, *(_decode_error(attention, rows) for _ in range(_DECODE_STEPS))]


def attention_config(head_dim: int, group: int) -> LlamaConfig:
    """Return a model of one layer, with `group` query heads per KV head."""
    return LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=group * _KV_HEADS,
        num_key_value_heads=_KV_HEADS,
        head_dim=head_dim,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def _prefill_error(attention: Attention, rows: _Rows, counts: dict[int, int]) -> float:
    chunks = [
        Chunk(row, len(rows.projections[row]), torch.zeros(count, dtype=torch.long, device=rows.parts.device))
        for row, count in counts.items()
    ]
    projections = [_random_projections(rows, count) for count in counts.values()]
    got = attention.prefill(chunks)(0, torch.cat(projections).flatten(1))
    expected = [rows.expected(row, p.cpu().double()) for row, p in zip(counts, projections, strict=True)]
    return _relative_error(got, torch.cat(expected))


def _decode_error(attention: Attention, rows: _Rows) -> float:
    lengths = [len(seen) for seen in rows.projections]
    positions = torch.tensor([*lengths, LENGTH - 1], device=rows.parts.device)
    projections = _random_projections(rows, len(positions))
    got = attention.decode(positions, positions, max(lengths) + 1)(0, projections.flatten(1))
    expected = [rows.expected(row, projections[row : row + 1].cpu().double()) for row in range(len(lengths))]
    return _relative_error(got[:-1], torch.cat(expected))


def _random_projections(rows: _Rows, count: int) -> Tensor:
    """Return projections [N, heads + 2 x KV heads, D] that need no rounding to the cache's type."""
    shape = rows.projections[0].shape[1:]
    projections = torch.randn(count, *shape, device=rows.parts.device)
    return projections.half().bfloat16().to(rows.parts.dtype)


def _check_linear(device: torch.device, quantization: Quantization, small: bool) -> dict[str, Any]:
    """Check two layers with the same input, joined as the engine joins them. Raises CheckFailed."""
    if quantization == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise Skipped("FP8 needs compute capability 8.9")
    torch.manual_seed(0)
    outputs, inputs = ((256, 128), 512) if small else ((2048, 1024), 8192)
    layers = [
        quantize(
            torch.randn(count, inputs, device=device).bfloat16() * 0.02, None, quantization, torch.bfloat16
        )
        for count in outputs
    ]
    weight = torch.cat([_dequantized(layer, quantization) for layer in layers])
    joined = packed_together(layers, torch.bfloat16, Scratch())
    errors = {}
    with torch.inference_mode():
        for count in _LINEAR_ROWS:
            x = torch.randn(count, inputs, device=device).bfloat16()
            errors[counted(count, "row")] = _relative_error(joined(x), x.cpu().double() @ weight.T)
    return {**_accepted(errors, _TOLERANCE[quantization]), "relative_errors": errors}


def _dequantized(layer: nn.Module, quantization: Quantization) -> Tensor:
    """Return the weights [out, in] of a layer, in float64 on the CPU."""
    stored = {name: tensor.cpu() for name, tensor in to_stored(layer).items()}
    weight = stored["weight"]
    if quantization == "fp8":
        return weight.double() * stored["weight_scale"].double()
    if quantization == "int8":
        return weight.double() * stored["SCB"].double()[:, None] / 127
    # Two weights per byte, the first one in the upper half, and 64 weights per scale.
    codes = torch.stack((weight.flatten() >> 4, weight.flatten() & 15), dim=1).flatten()
    values = stored["weight.quant_map"].double()[codes.long()].view(-1, 64)
    scaled = values * stored["weight.absmax"].double()[:, None]
    return scaled.view(stored_shape(layer))


def _relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest relative error of a vector [..., D] of `expected`. It is NaN if a number is NaN."""
    difference = got.cpu().double().view_as(expected) - expected
    return float((difference.norm(dim=-1) / expected.norm(dim=-1)).max())


def _accepted(errors: dict[str, float], tolerance: float) -> dict[str, float]:
    """Return the largest error. Raises CheckFailed if an error is larger than tolerated, or NaN."""
    if not all(error <= tolerance for error in errors.values()):
        raise CheckFailed(f"relative errors: {errors}; at most {tolerance} is tolerated")
    return {"relative_error": max(errors.values()), "tolerance": tolerance}
