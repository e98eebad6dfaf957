"""Compare quantized linear layers with the product of their dequantized weights, in float64 on the CPU.

Knows how each precision stores a weight; knows nothing about models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.measurements import CheckFailed, Skipped
from llama.model.quantized_layers import Quantization, quantize, stored_shape, to_stored
from llama.torch_engine.linears import Scratch, packed_together

_ROWS = (1, 4, 16, 17, 32, 300)
"""Libraries choose other kernels for other numbers of rows."""
_TOLERANCE: dict[Quantization, float] = {
    "fp8": 2.0**-4,  # inputs are rounded to 3 bits of mantissa, which changes each by at most this fraction
    "int8": 0.02,  # inputs are rounded to 255 steps between the row's largest values, of about 4.5 deviations
    "nf4": 2.0**-7,  # inputs are not rounded, but weights and results are, to 8 bits
}


def check_linear(device: torch.device, quantization: Quantization, *, small: bool) -> dict[str, Any]:
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
    weight = torch.cat([dequantized(layer, quantization) for layer in layers])
    joined = packed_together(layers, torch.bfloat16, Scratch())
    errors = {}
    with torch.inference_mode():
        for rows in _ROWS:
            x = torch.randn(rows, inputs, device=device).bfloat16()
            expected = x.cpu().double() @ weight.T
            difference = joined(x).cpu().double() - expected
            errors[rows] = (difference.norm(dim=-1) / expected.norm(dim=-1)).max().item()
    tolerance = _TOLERANCE[quantization]
    if not all(error <= tolerance for error in errors.values()):  # also if one is NaN
        raise CheckFailed(f"relative errors by number of rows: {errors}; at most {tolerance} is tolerated")
    return {
        "relative_error": max(errors.values()),
        "tolerance": tolerance,
        "by_number_of_rows": {str(rows): error for rows, error in errors.items()},
    }


def dequantized(layer: nn.Module, quantization: Quantization) -> Tensor:
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
