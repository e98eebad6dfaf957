"""The key/value cache: one preallocated tensor pair a layer, divided into slots of one context each.

Knows shapes and bytes; knows nothing of requests (`scheduler.py` gives slots out).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaConfig

from llama.errors import DoesNotFit

SMALLEST_CONTEXT = 64


@dataclass(frozen=True, slots=True)
class CachePlan:
    """How a memory budget is divided: `slots` requests at once, `length` tokens each."""

    slots: int
    length: int


def bytes_per_token(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers: 2 x layers x KV heads x head_dim x element size."""
    heads = config.num_key_value_heads * config.head_dim
    return int(2 * config.num_hidden_layers * heads * dtype.itemsize)


def plan_cache(
    config: LlamaConfig, dtype: torch.dtype, *, budget: int, context: int, slots: int
) -> CachePlan:
    """At most `slots` requests of `context` tokens in `budget` bytes; a shorter context when not even
    one fits. Raises DoesNotFit when that would be too short to be of use."""
    per_token = bytes_per_token(config, dtype)
    length = min(context, budget // per_token)
    if length < min(context, SMALLEST_CONTEXT):
        raise DoesNotFit(
            f"the key/value cache may take {budget} bytes and one token needs {per_token}; "
            f"give it at least {per_token * SMALLEST_CONTEXT} bytes (LLAMA_CACHE_MEMORY) or a smaller model"
        )
    return CachePlan(slots=min(slots, budget // (per_token * length)), length=length)


class KVCache:
    """`keys[layer]` and `values[layer]`: [slots, KV heads, length, head_dim], zeros at first."""

    def __init__(
        self, config: LlamaConfig, plan: CachePlan, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (plan.slots, config.num_key_value_heads, plan.length, config.head_dim)

        def per_layer() -> list[torch.Tensor]:
            return [_zeros(shape, dtype, device) for _ in range(config.num_hidden_layers)]

        self.plan = plan
        self.keys, self.values = per_layer(), per_layer()

    def clear(self, slot: int) -> None:
        """Forget a slot's contents. Not needed between healthy requests: what a mask hides has weight
        zero. But zero times NaN is NaN, so what a failed request left must not stay."""
        for tensor in (*self.keys, *self.values):
            tensor[slot].zero_()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU memory that is not resident until it is written, as torch's own zeros is at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
