"""A linear layer in FP8, computed with torch's scaled matrix product.

transformers has such a layer too, but it downloads its kernel from a hub at run time, which is impossible in
a container without network access.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

BLOCK_SIZE = {"cpu": 2**18, "cuda": 2**24}
"""The number of weights that are quantized at a time, by device. It keeps temporary tensors small compared
with a layer."""
WIDTH_MULTIPLE = 16
"""On a GPU, torch multiplies only by weights whose dimensions are multiples of this number. Source:
`_check_scaled_mm_sizes` in torch's _meta_registrations.py."""
_WITHOUT_KERNEL = {(10, 3), (12, 1)}  # B300 and GB10, by the build flags of torch 2.11 for CUDA 12.8
_E4M3 = torch.float8_e4m3fn
_E4M3_MAX = torch.finfo(_E4M3).max
_SMALLEST = 1e-12  # keeps the scale of a row of zeros above zero


class Fp8Linear(nn.Module):
    """Weights in e4m3 with one scale per output. Each input row is rounded to e4m3 with its own scale."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """`weight` [out, in] e4m3, `scale` [out, 1] float32, `bias` [out] or None."""
        super().__init__()
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def quantize(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """Quantize weights [out, in] of any floating-point type."""
        rounded, scale = torch.empty_like(weight, dtype=_E4M3), weight.new_empty(len(weight), 1).float()
        for rows in row_blocks(weight):
            rounded[rows], scale[rows] = _rounded(weight[rows])
        return cls(rounded, scale, bias)

    def forward(self, x: Tensor) -> Tensor:
        product = self._product(*_rounded(x.reshape(-1, self.in_features)), x.dtype)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], self.out_features)

    @cached_property
    def _one(self) -> Tensor | None:
        """A scale of 1 if a product must have one scale for each matrix; otherwise None."""
        device = self.weight.device
        return torch.ones((), device=device) if _needs_single_scale(device) else None

    def _product(self, rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiply rows [N, in] e4m3 with scales [N, 1] by the weights. Return [N, out] of type `dtype`."""
        weight_scale, one = self.weight_scale.t(), self._one
        product = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scale if one is None else one,
            scale_b=weight_scale if one is None else one,
            out_dtype=torch.bfloat16,  # the only type that the CUDA kernel supports with one scale per row
        )
        if one is not None:
            # In place: float32 would need twice the memory. Rounding to e4m3 loses far more than this.
            product.mul_(scale).mul_(weight_scale)
        return product.to(dtype)


def _needs_single_scale(device: torch.device) -> bool:
    """Whether a product must have one scale for each matrix, instead of one for each row.

    On compute capability 8.9, torch 2.11's kernel with a scale for each row clears its workspace on another
    stream. A CUDA graph does not contain that, so a replay may never end, or give wrong results. torch 2.12
    fixes this: github.com/pytorch/pytorch/pull/177651.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (8, 9)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows [N, K] to e4m3 [N, K] with scales [N, 1]. The product of the two restores the rows."""
    # This runs before every matrix product of a step, so it should launch few kernels. The infinity norm
    # finds the largest absolute value with one kernel.
    largest = torch.linalg.vector_norm(rows, ord=float("inf"), dim=-1, keepdim=True, dtype=torch.float32)
    scale = largest.clamp(min=_SMALLEST) / _E4M3_MAX
    rounded = torch.empty_like(rows, dtype=_E4M3)
    # On a GPU, one kernel divides and converts. The quotient may be just above the largest e4m3 number; the
    # conversion rounds it down again.
    torch.div(rows, scale, out=rounded)
    return rounded, scale


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """Yield slices that divide the rows of a weight into blocks of about BLOCK_SIZE weights."""
    step = max(BLOCK_SIZE[weight.device.type] // weight.shape[1], 1)
    for start in range(0, len(weight), step):
        yield slice(start, start + step)


def refusals_of_fp8(config: LlamaConfig, capability: tuple[int, int]) -> Iterator[str]:
    """Yield the reasons why torch cannot multiply a model's layers on a GPU of this compute capability.

    The engine joins the projections to queries, keys and values, so the sum of their outputs counts.
    """
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    widths = (config.hidden_size, config.intermediate_size, queries, queries + 2 * keys)
    if uneven := next((width for width in widths if width % WIDTH_MULTIPLE), None):
        yield f"needs widths that are multiples of {WIDTH_MULTIPLE} (a layer has {uneven})"
    if capability in _WITHOUT_KERNEL:
        yield f"is not supported on compute capability {capability[0]}.{capability[1]} by torch 2.11"
