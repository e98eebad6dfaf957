"""Check that the engine computes the same on a device as on the CPU, with small models.

Each check has a name in the results, and a check that fails does not end the others. Knows which checks there
are; `attention_check.py`, `linear_check.py` and `engine_check.py` have them.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.gpu.attention_check import LENGTH, attention_config, check_attention
from benchmarks.gpu.engine_check import check_engine, check_tokens
from benchmarks.gpu.linear_check import check_linear
from benchmarks.gpu.measurements import Measurements
from benchmarks.gpu.stepper import placement_of
from llama.model.quantized_layers import Quantization

_QUANTIZATIONS: tuple[Quantization, ...] = ("fp8", "nf4", "int8")
_TYPES = ("bfloat16", "float16")


def check_all(measurements: Measurements, device: torch.device, small: bool) -> None:
    """Run all checks. `small` makes them fast on a CPU."""
    take = measurements.take
    take("tokens in float32", partial(check_tokens, device))
    for dtype, head_dim, group in product(_TYPES, (64, 128), (1, 8)):
        name = f"attention in {dtype}, head_dim {head_dim}, {group} query heads per KV head"
        take(name, partial(_attention, device, dtype, head_dim, group, small))
    for quantization in _QUANTIZATIONS:
        take(f"linear layers in {quantization}", partial(check_linear, device, quantization, small=small))
    for dtype in _TYPES:
        take(f"engine in {dtype}", partial(check_engine, device, dtype, "none"))
    for quantization in _QUANTIZATIONS:
        take(f"engine in {quantization}", partial(check_engine, device, "bfloat16", quantization))


def _attention(device: torch.device, dtype: str, head_dim: int, group: int, small: bool) -> dict[str, Any]:
    config = attention_config(head_dim, group)
    placement = placement_of(config, device, "none", dtype, LENGTH)
    return check_attention(config, placement, small=small)
