"""Operators that a CUDA build computes in a way that the shape functions of torch do not show.

Knows operators; knows nothing about the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

ON_CUDA = frozenset({"_fused_rms_norm"})
"""Operators that have a kernel of their own in a CUDA build and are composed of others in a CPU build."""


def _sdpa_with_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute `scaled_dot_product_attention` with a mask, as a CUDA build does.

    Flash attention takes no mask, and the engine switches cuDNN off. So a CUDA build chooses the memory-efficient
    kernel, with the mask in the type of the queries and the strides of its rows padded to a multiple of 8. A CPU
    build cannot choose it. Source: torch's attention.cpp and sdp_utils.cpp.
    """
    assert attn_mask is not None
    assert (is_causal, enable_gqa, dropout_p) == (False, False, 0.0)
    assert query.shape[-1] % 8 == 0
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))  # the kernel requires this
    bias = attn_mask
    if bias.dtype is torch.bool:
        zero, infinite = (
            torch.scalar_tensor(value, dtype=query.dtype, device=query.device)
            for value in (0.0, float("-inf"))
        )
        bias = torch.where(attn_mask, zero, infinite)
    assert bias.dtype is query.dtype
    if bias.stride(-1) != 1 or any(stride % 8 for stride in bias.stride()[:-1]):
        width = bias.shape[-1]
        bias = torch.nn.functional.pad(bias, (0, 8 - width % 8))[..., :width]
    bias = bias.expand(*query.shape[:3], bias.shape[-1])
    attend = torch.ops.aten._scaled_dot_product_efficient_attention.default
    attended: Tensor = attend(query, key, value, bias, False, scale=scale)[0]
    return attended


COMPOSED: Mapping[str, Callable[..., Any]] = {"aten.scaled_dot_product_attention.default": _sdpa_with_mask}
"""Functions that replace an operator by others, which are reported instead of it."""
