"""Creates quantized linear layers, from unquantized weights or from the tensors of a quantized checkpoint.

NF4 and int8 layers are bitsandbytes' own; the FP8 layer is in `fp8_linear.py`. All are stored in the format
of transformers. Knows one layer at a time; knows nothing about models or files.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llama.model.fp8_linear import BLOCK_SIZE, Fp8Linear, row_blocks

Quantization = Literal["none", "fp8", "int8", "nf4"]

STORED_SCALE: Mapping[Quantization, str] = {"fp8": "weight_scale", "int8": "SCB", "nf4": "weight.absmax"}
"""The name of the tensor that identifies a stored layer's precision."""

_NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
_NF4_BLOCK = 64


def bytes_of_weight(outputs: int, inputs: int, quantization: Quantization, dtype: torch.dtype) -> int:
    """Bytes of one layer's weights, including scales. Unquantized weights are in `dtype`."""
    match quantization:
        case "nf4":  # half a byte per weight, and a float32 scale per block
            return outputs * inputs // 2 + 4 * (outputs * inputs // _NF4_BLOCK)
        case "int8" | "fp8":  # one byte per weight, and a float32 scale per output
            return outputs * inputs + 4 * outputs
        case "none":
            return dtype.itemsize * outputs * inputs


def quantize(
    weight: Tensor, bias: Tensor | None, quantization: Quantization, arithmetic: torch.dtype
) -> nn.Module:
    """Create a layer from weights [out, in] of any floating-point type.

    The layer is on the device of the weights, and expects inputs of the dtype `arithmetic`.
    """
    match quantization:
        case "none":
            return linear(weight, bias)
        case "fp8":
            return Fp8Linear.quantize(weight, bias)
        case "int8":
            import bitsandbytes as bnb

            rounded, scale = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight)).float()
            for rows in row_blocks(weight):
                rounded[rows], scale[rows], _ = bnb.functional.int8_vectorwise_quant(weight[rows].half())
            return _int8(rounded, scale, bias)
        case "nf4":
            return _nf4(_rounded_to_nf4(weight), bias, arithmetic)


def _rounded_to_nf4(weight: Tensor) -> Tensor:
    """Quantize a weight [out, in] to a parameter of bitsandbytes, BLOCK_SIZE weights at a time."""
    import bitsandbytes as bnb

    count, step = weight.numel(), BLOCK_SIZE[weight.device.type]
    packed = weight.new_empty(-(-count // 2), 1, dtype=torch.uint8)
    absmax = weight.new_empty(-(-count // _NF4_BLOCK), dtype=torch.float32)
    for index, part in enumerate(torch.split(weight.contiguous().view(-1), step)):
        rounded, state = bnb.functional.quantize_4bit(
            part, blocksize=_NF4_BLOCK, compress_statistics=False, quant_type="nf4"
        )
        packed[index * step // 2 :][: len(rounded)] = rounded
        absmax[index * step // _NF4_BLOCK :][: len(state.absmax)] = state.absmax
    state.absmax, state.shape = absmax, weight.shape
    parameter: Tensor = bnb.nn.Params4bit(
        packed, quant_state=state, quant_type="nf4", compress_statistics=False, bnb_quantized=True
    )
    return parameter


def stored_names(quantization: Quantization, *, bias: bool, nested: bool) -> frozenset[str]:
    """The names of the tensors that a checkpoint stores for a layer. With `nested`, NF4's scales are
    quantized as well."""
    names = {"weight", *(["bias"] if bias else [])}
    if quantization != "none":
        names.add(STORED_SCALE[quantization])
    if quantization == "nf4":
        names |= {"weight.quant_map", _NF4_STATE}
        names |= {"weight.nested_absmax", "weight.nested_quant_map"} if nested else set()
    return frozenset(names)


def from_stored(
    tensors: Mapping[str, Tensor], quantization: Quantization, arithmetic: torch.dtype
) -> nn.Module:
    """Create a layer from its stored tensors, on their device. It expects inputs of dtype `arithmetic`."""
    weight, bias = tensors["weight"], tensors.get("bias")
    match quantization:
        case "none":
            return linear(weight, bias)
        case "fp8":
            return Fp8Linear(weight, tensors["weight_scale"].float(), bias)
        case "int8":
            return _int8(weight, tensors["SCB"].float(), bias)
        case "nf4":
            import bitsandbytes as bnb

            state = {
                name: tensor.cpu() if name == _NF4_STATE else tensor
                for name, tensor in tensors.items()
                if name not in ("weight", "bias")
            }
            parameter = bnb.nn.Params4bit.from_prequantized(weight, state, device=weight.device)
            return _nf4(parameter, bias, arithmetic)


def to_stored(layer: nn.Module) -> dict[str, Tensor]:
    """The tensors of a quantized layer, by their names in a checkpoint."""
    return {name: tensor.detach().contiguous() for name, tensor in layer.state_dict().items()}


def stored_shape(layer: nn.Module) -> tuple[int, int]:
    """The shape [out, in] of the weights that a layer stores, before packing into bytes."""
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None)
    outputs, inputs = weight.shape if state is None else state.shape
    return int(outputs), int(inputs)


def to_config(quantization: Quantization) -> dict[str, object]:
    """The `quantization_config` of a `config.json`. transformers reads every format; vLLM reads only FP8."""
    match quantization:
        case "none":
            return {}
        case "fp8":
            return {
                "quant_method": "fbgemm_fp8",
                "activation_scale_ub": 1200.0,  # transformers' default; vLLM requires the field
                "modules_to_not_convert": ["lm_head"],
            }
        case "int8":
            return {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0}
        case "nf4":
            return {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def from_config(config: Mapping[str, object]) -> Quantization | None:
    """The precision that a `quantization_config` describes: "none" if it is empty, None if this module cannot
    read it."""
    if not config:
        return "none"
    method = config.get("quant_method")
    if method == "fbgemm_fp8":
        return "fp8"
    if method == "bitsandbytes" and config.get("load_in_8bit"):
        return "int8"
    if method == "bitsandbytes" and config.get("load_in_4bit"):
        return "nf4" if config.get("bnb_4bit_quant_type") == "nf4" else None
    return None


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Create an unquantized layer that uses the given tensors without copying them."""
    with torch.device("meta"):
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    module.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    return module


def _int8(weight: Tensor, scale: Tensor, bias: Tensor | None) -> nn.Module:
    import bitsandbytes as bnb

    # Otherwise every layer of every step logs a warning that inputs are converted to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    with torch.device("meta"):
        # With a threshold above 0, every layer synchronizes with the host, which a CUDA graph cannot capture.
        module = bnb.nn.Linear8bitLt(
            weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=0.0
        )
    module.weight = bnb.nn.Int8Params(weight, requires_grad=False, CB=weight, SCB=scale)
    return _with_bias(module, bias)


def _nf4(parameter: Tensor, bias: Tensor | None, arithmetic: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    state = parameter.quant_state  # type: ignore[attr-defined]
    outputs, inputs = state.shape
    with torch.device("meta"):
        module = bnb.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=arithmetic, quant_type="nf4")
    # bitsandbytes' layout for CPUs with AVX512-BF16 requires a multiple of 32 outputs and complete blocks.
    module.support_avx512bf16_for_cpu &= outputs % 32 == 0 and inputs % _NF4_BLOCK == 0
    module.weight, module.quant_state = parameter, state
    parameter.module = module  # type: ignore[attr-defined]
    return _with_bias(module, bias)


def _with_bias(module: nn.Module, bias: Tensor | None) -> nn.Module:
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    return module.eval()
