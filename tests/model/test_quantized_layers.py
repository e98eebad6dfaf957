"""Quantized linear layers, compared with the matrix product of the original or the dequantized weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llama.model.fp8_linear import Fp8Linear
from llama.model.quantized_layers import Quantization, from_stored, quantize, stored_names, to_stored
from llama.torch_engine.linears import joined, packed

INPUTS, OUTPUTS = 64, 48


def linear(outputs: int = OUTPUTS, *, bias: bool = False, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(INPUTS, outputs, bias=bias).requires_grad_(False)


def quantized(layer: nn.Linear, quantization: Quantization) -> nn.Module:
    return quantize(layer.weight, layer.bias, quantization, torch.float32)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(1))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("quantization", "most"), [("fp8", 0.05), ("int8", 0.02), ("nf4", 0.12)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3)])
def test_a_quantized_layer_gives_nearly_the_same_output(
    quantization: Quantization, most: float, bias: bool, shape: tuple[int, ...]
) -> None:
    plain = linear(bias=bias)
    layer = quantized(plain, quantization)
    x = inputs(*shape)
    assert layer(x).shape == (*shape, OUTPUTS)
    assert layer(x).dtype is x.dtype
    assert 0 < relative_error(layer(x), plain(x)) < most


def test_without_a_quantization_a_layer_is_unchanged() -> None:
    plain = linear()
    assert torch.equal(quantized(plain, "none")(inputs(2)), plain(inputs(2)))


def test_an_fp8_layer_multiplies_by_its_dequantized_weights() -> None:
    layer = quantized(linear(bias=True), "fp8")
    assert isinstance(layer, Fp8Linear)
    # e4m3 represents these inputs exactly, so only the result is rounded, to bfloat16.
    x = inputs(5).mul(8).round().clamp(-14, 14)
    x[:, 0] = 14.0  # the scale is then 14 / 448, a power of two, which does not round the inputs
    weight = layer.weight.float() * layer.weight_scale
    assert layer.bias is not None
    assert relative_error(layer(x), x @ weight.t() + layer.bias) < 0.004


def test_fp8_has_one_scale_per_output_and_per_input_row() -> None:
    plain = linear()
    plain.weight[3] *= 1000
    x = inputs(4)
    x[2] *= 1e-4
    error = (quantized(plain, "fp8")(x) - plain(x)).norm(dim=0) / plain(x).norm(dim=0)
    assert error.max() < 0.3  # one scale for all outputs would lose most of the small ones
    rows = (quantized(plain, "fp8")(x) - plain(x)).norm(dim=1) / plain(x).norm(dim=1)
    assert rows.max() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 5])
def test_fp8_with_one_scale_for_each_matrix_gives_the_same_products(dtype: torch.dtype, rows: int) -> None:
    """GPUs of compute capability 8.9 multiply in this way."""
    layer = quantized(linear(), "fp8")
    assert isinstance(layer, Fp8Linear)
    x = inputs(rows).to(dtype)
    by_row = layer(x)
    layer._one = torch.ones(())
    assert layer(x).dtype is dtype
    assert (layer(x) - by_row).float().norm() < 0.01 * by_row.float().norm()  # both round to bfloat16


def test_fp8_of_zeros_is_zero() -> None:
    layer = quantized(linear(), "fp8")
    assert torch.equal(layer(torch.zeros(2, INPUTS)), torch.zeros(2, OUTPUTS))
    plain = linear()
    plain.weight.zero_()
    assert torch.equal(quantized(plain, "fp8")(inputs(2)), torch.zeros(2, OUTPUTS))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantization", ["fp8", "int8", "nf4"])
def test_joined_layers_give_the_outputs_of_the_separate_layers(
    quantization: Quantization, bias: bool
) -> None:
    layers = [quantized(linear(n, bias=bias, seed=n), quantization) for n in (OUTPUTS, 16, 16)]
    x = inputs(5)
    together = joined(layers)(x)
    assert torch.equal(together, torch.cat([layer(x) for layer in layers], dim=-1))


def test_joined_fp8_layers_are_one_layer_which_packing_does_not_change() -> None:
    layer = joined([quantized(linear(seed=n), "fp8") for n in range(2)])
    assert isinstance(layer, Fp8Linear)
    assert packed(layer, torch.float32) is layer


def test_nf4_gives_the_outputs_of_bitsandbytes_own_conversion() -> None:
    import bitsandbytes as bnb

    outputs = 64  # bitsandbytes itself fails with 48 outputs on some CPUs
    plain = linear(outputs)
    reference = bnb.nn.Linear4bit(
        INPUTS, outputs, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=False
    )
    reference.load_state_dict({"weight": plain.weight})
    x = inputs(3)
    assert torch.equal(quantized(plain, "nf4")(x), reference.to("cpu").eval()(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantization", ["none", "fp8", "int8", "nf4"])
def test_a_stored_layer_is_restored_unchanged(quantization: Quantization, bias: bool) -> None:
    layer = quantized(linear(bias=bias), quantization)
    tensors = to_stored(layer)
    assert stored_names(quantization, bias=bias, nested=False) <= tensors.keys()
    again = from_stored(
        {name: tensor.clone() for name, tensor in tensors.items()}, quantization, torch.float32
    )
    assert torch.equal(again(inputs(3)), layer(inputs(3)))
