"""The linear layers of a step: plain ones are joined and, on a CPU, packed for a faster kernel.

Takes modules of a loaded model and returns modules that compute the same. FP8 layers are joined too; other
quantized layers and layers with adapters are used unchanged. Knows weights and kernels; knows nothing about
attention or requests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from llama.model.fp8_linear import Fp8Linear
from llama.model.quantized_layers import linear

Array = Any  # a numpy array

PANEL = 64
"""The number of outputs whose weights are side by side in a packed weight."""
_FLOAT16_MAX = torch.finfo(torch.float16).max
_BATCH_HINT = 32  # the number of rows for which oneDNN packs a weight; results are correct for any number


def joined(modules: Sequence[nn.Module]) -> nn.Module:
    """Return one module that replaces several with the same input. Its output is theirs, concatenated.

    The weights of plain and FP8 layers are copied into one tensor; the caller should release the originals.
    """
    fp8 = [module for module in modules if isinstance(module, Fp8Linear)]
    if len(fp8) == len(modules):
        weight, scale = (
            torch.cat([getattr(layer, name) for layer in fp8]) for name in ("weight", "weight_scale")
        )
        return Fp8Linear(weight, scale, _joined_biases(fp8))
    plain = [module for module in modules if _is_plain(module)]
    if len(plain) < len(modules):
        return _SideBySide(modules)
    return linear(torch.cat([module.weight.detach() for module in plain]), _joined_biases(plain))


def _joined_biases(layers: Sequence[nn.Linear] | Sequence[Fp8Linear]) -> Tensor | None:
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    assert len(biases) in (0, len(layers))  # the configuration has one flag for all of them
    return torch.cat(biases) if biases else None


class Scratch:
    """Memory for joined and converted weights.

    The same memory is used for every layer, because page faults in new memory take longer than the copying.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def joined(self, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Join weights [out, in] into one of type `dtype`, which is valid until the next call.

        A single weight that already has this type is returned without a copy.
        """
        if len(weights) == 1 and weights[0].dtype is dtype:
            return weights[0]
        rows, columns = [len(weight) for weight in weights], weights[0].shape[1]
        size = sum(rows) * columns * dtype.itemsize
        if self._bytes.numel() < size:
            self._bytes = torch.empty(size, dtype=torch.uint8)
        result = self._bytes[:size].view(dtype).view(sum(rows), columns)
        for part, weight in zip(torch.split(result, rows), weights, strict=True):
            part.copy_(weight)
        return result


def packed(module: nn.Module, arithmetic: torch.dtype) -> nn.Module:
    """Pack a plain layer on a CPU for its fastest kernel, with inputs of type `arithmetic`.

    Any other module is returned unchanged.
    """
    return packed_together([module], arithmetic, Scratch())


def packed_together(modules: Sequence[nn.Module], arithmetic: torch.dtype, scratch: Scratch) -> nn.Module:
    """Join layers with the same input as `joined` does, and pack them as `packed` does.

    The packed result shares no memory with the weights.
    """
    plain = [module for module in modules if _is_plain(module) and module.weight.device.type == "cpu"]
    if len(plain) < len(modules):
        return modules[0] if len(modules) == 1 else joined(modules)
    weights = [module.weight.detach() for module in plain]
    bias = _joined_biases(plain)
    bias = None if bias is None else bias.to(arithmetic)
    if weights[0].dtype is not arithmetic and _has_half_kernel() and all(map(_fits_half, weights)):
        return _HalfLinear(scratch.joined(weights, torch.float32), bias)
    weight = scratch.joined(weights, arithmetic)
    return OneDNNLinear(weight, bias) if torch._C._has_mkldnn else linear(weight.clone(), bias)


def _fits_half(weight: Tensor) -> bool:
    smallest, largest = torch.aminmax(weight)
    return bool(smallest >= -_FLOAT16_MAX and largest <= _FLOAT16_MAX)


class _HalfLinear(nn.Module):
    """FBGEMM with weights in float16, which halves the bytes to read; inputs, sums and outputs are float32.

    float16 weights are stored exactly, and so are bfloat16 weights down to float16's smallest normal number.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return result


class OneDNNLinear(nn.Module):
    """oneDNN with inputs, weights and outputs of one type, and weights in the layout of its kernels."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _BATCH_HINT)
        self._bias = bias
        self.outputs = len(weight)
        self.panels = None if bias is not None else panels_of(self._packed, weight)
        """The packed weight as `cpu_kernels.linear_rows` reads it, or None if the layout is another one."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return result


def panels_of(packed: Tensor, weight: Tensor) -> Array | None:
    """Return the memory of a packed weight as an array [outputs / PANEL, inputs / 2, PANEL] of pairs of
    bfloat16 numbers, or None if it has another layout.

    oneDNN chooses the layout by processor and shape, and does not document it. So the first and the last
    panel are compared with the weight.
    """
    outputs, inputs = weight.shape
    if weight.dtype is not torch.bfloat16 or outputs % PANEL or inputs % 2:
        return None
    if torch.ops.mkldnn._nbytes(packed) != weight.nbytes:
        return None
    memory = (ctypes.c_uint32 * (outputs * inputs // 2)).from_address(torch.ops.mkldnn.data_ptr(packed))
    panels = np.ctypeslib.as_array(memory).reshape(outputs // PANEL, inputs // 2, PANEL)
    pairs = weight.view(torch.uint16).numpy().view(np.uint32)
    for rows, panel in ((pairs[:PANEL], panels[0]), (pairs[-PANEL:], panels[-1])):
        if not np.array_equal(rows.T, panel):
            return None
    return panels


class _SideBySide(nn.Module):
    """Layers that cannot be joined. They are called one after the other."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self._parts = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self._parts], dim=-1)


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear


def _has_half_kernel() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines
