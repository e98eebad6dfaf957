"""A linear layer in FP8 over torch's scaled product.

transformers' own layer fetches a kernel from a hub at run time, which a sealed container cannot.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor, nn

AT_A_TIME = {"cpu": 2**18, "cuda": 2**24}
"""Weights quantized at a time, by device: what is computed on the way is then small beside a layer."""
_E4M3 = torch.float8_e4m3fn
_E4M3_MAX = torch.finfo(_E4M3).max
_TINIEST = 1e-12  # a row of zeros has some scale


class Fp8Linear(nn.Module):
    """Weights in e4m3 with one scale an output; each input row is rounded to e4m3 with a scale of its own."""

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
        """From weights [out, in] of any floating type."""
        rounded, scale = torch.empty_like(weight, dtype=_E4M3), weight.new_empty(len(weight), 1).float()
        for rows in row_blocks(weight):
            rounded[rows], scale[rows] = _rounded(weight[rows])
        return cls(rounded, scale, bias)

    def forward(self, x: Tensor) -> Tensor:
        rounded, scale = _rounded(x.reshape(-1, self.in_features))
        # With a scale a row the kernel gives bfloat16 only.
        product = torch._scaled_mm(
            rounded, self.weight.t(), scale_a=scale, scale_b=self.weight_scale.t(), out_dtype=torch.bfloat16
        ).to(x.dtype)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], self.out_features)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, K] in e4m3 and the scale of each [N, 1]: what is read back is their product."""
    # Few kernels: it runs before every product of a step. The norm is the largest, found in one.
    largest = torch.linalg.vector_norm(rows, ord=float("inf"), dim=-1, keepdim=True, dtype=torch.float32)
    scale = largest.clamp(min=_TINIEST) / _E4M3_MAX
    # The largest quotient may be rounded to just above the largest e4m3, to which it then rounds back.
    return (rows / scale).to(_E4M3), scale


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """Rows of a weight, some at a time."""
    step = max(AT_A_TIME[weight.device.type] // weight.shape[1], 1)
    for start in range(0, len(weight), step):
        yield slice(start, start + step)
