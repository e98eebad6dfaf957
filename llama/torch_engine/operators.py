"""The operators of a layer other than attention: with torch, or with compiled kernels on a CPU.

With few rows, calling a torch operator takes longer than its computation. So one kernel replaces several
operators. Knows tensors; knows nothing about attention or requests.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.torch_engine.cpu_compiler import Kernels, as_array
from llama.torch_engine.layers import Layer, Norm
from llama.torch_engine.linears import OneDNNLinear

_FEW = 4
"""Up to this many rows, a matrix product takes as long as reading its weights. The kernel reads them faster
than oneDNN: for the benchmark model and one row, at 33 instead of 20 to 26 GB/s on 2 cores of an EPYC."""


class Operators(Protocol):
    """N is the number of tokens in a step."""

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Apply a linear layer to [N, inputs]."""

    def add_and_norm(self, x: Tensor, delta: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """Return x + delta, and the norm of that sum. May overwrite `x`. All are [N, hidden]."""

    def gated(self, layer: Layer, gate_up: Tensor) -> Tensor:
        """Return activation(gate) x up, [N, width], from [N, 2 x width], which has the gates first."""


class TorchOperators:
    """The operators of torch, on any device."""

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = layer(x)
        return result

    def add_and_norm(self, x: Tensor, delta: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        x = x + delta
        return x, F.rms_norm(x, norm.weight.shape, norm.weight, norm.epsilon)

    def gated(self, layer: Layer, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated: Tensor = layer.activation(gate)
        return activated * up


class CompiledOperators(TorchOperators):
    """Compiled kernels, and torch's operators for what they do not support."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        kernel = self._kernels.linear_rows
        if len(x) > _FEW or kernel is None or not isinstance(layer, OneDNNLinear) or layer.panels is None:
            return super().linear(layer, x)
        result = torch.empty(len(x), layer.outputs, dtype=x.dtype)
        kernel(layer.panels, as_array(x), as_array(result))
        return result

    def add_and_norm(self, x: Tensor, delta: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        normed = torch.empty_like(x)
        self._kernels.add_and_norm(
            as_array(x), as_array(delta), as_array(norm.weight), np.float32(norm.epsilon), as_array(normed)
        )
        return x, normed

    def gated(self, layer: Layer, gate_up: Tensor) -> Tensor:
        if layer.activation is not F.silu:
            return super().gated(layer, gate_up)
        result = torch.empty(len(gate_up), gate_up.shape[1] // 2, dtype=gate_up.dtype)
        self._kernels.swiglu(as_array(gate_up), as_array(result))
        return result
