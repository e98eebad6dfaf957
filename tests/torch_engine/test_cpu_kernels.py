"""The compiled kernels other than attention, compared with torch's operators in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import kernels_of, rounding
from torch import Tensor

from llama.model.placement import has_fast_bfloat16
from llama.torch_engine.cpu_compiler import as_array
from llama.torch_engine.linears import PANEL, OneDNNLinear, panels_of


def stored_values(numbers: Tensor, cached: torch.dtype) -> Tensor:
    """Numbers in float32 [N], after they have been written into a cache of another type."""
    qkv = torch.zeros(len(numbers), 3 * 2)
    qkv[:, 4] = numbers
    cache = torch.zeros(2, 1, 1, len(numbers), 2, dtype=cached)
    table, queries = torch.ones(len(numbers), 2), torch.empty(len(numbers), 2)
    arrays = [as_array(tensor) for tensor in (qkv, table, table, cache, queries)]
    kernels_of(torch.float32, cached).store_chunk(*arrays[:3], 0, arrays[3], 0, 0, arrays[4])
    return cache[1, 0, 0, :, 0]


@pytest.mark.parametrize("cached", [torch.bfloat16, torch.float16])
def test_numbers_are_rounded_to_the_nearest_and_ties_to_even(cached: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(cached).float()
    every = every[every.isfinite()].sort().values
    ties = (every[:-1].double() + every[1:].double()) / 2  # exact in float32
    ties = ties.float()
    numbers = torch.cat(
        [
            every,  # with subnormal numbers and zeros of both signs
            ties,
            torch.nextafter(ties, torch.full_like(ties, float("inf"))),
            torch.nextafter(ties, torch.full_like(ties, float("-inf"))),
            torch.tensor(
                [float("inf"), float("-inf"), 3.4028235e38, -3.4028235e38, 65519.9, 65520.0, 1e-45, -1e-45]
            ),
        ]
    )
    stored, wanted = stored_values(numbers, cached), numbers.to(cached)
    assert torch.equal(stored.view(torch.int16), wanted.view(torch.int16))
    assert stored_values(torch.tensor([float("nan"), -float("nan"), 1.0]), cached).isnan().tolist() == [
        True,
        True,
        False,
    ]


def tokens(count: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@DTYPES
@pytest.mark.parametrize(("count", "width"), [(1, 1), (1, 768), (3, 33), (70, 64)])
def test_add_and_norm_equals_a_sum_and_a_root_mean_square_norm(
    dtype: torch.dtype, count: int, width: int
) -> None:
    x, delta, weight = (
        tokens(count, width, dtype, 1),
        tokens(count, width, dtype, 2),
        tokens(1, width, dtype, 3)[0],
    )
    total, normed = x.clone(), torch.empty_like(x)
    epsilon = 1e-2  # large enough that a mistake would show
    arrays = as_array(total), as_array(delta), as_array(weight)
    kernels_of(dtype).add_and_norm(*arrays, np.float32(epsilon), as_array(normed))
    assert torch.equal(total, x + delta)
    wanted = F.rms_norm((x + delta).float(), (width,), weight.float(), epsilon)
    torch.testing.assert_close(normed.float(), wanted, rtol=rounding(dtype), atol=1e-6)


@DTYPES
@pytest.mark.parametrize(("count", "width"), [(1, 1), (1, 2048), (3, 33), (70, 64)])
def test_swiglu_equals_silu_of_the_gates_times_the_others(dtype: torch.dtype, count: int, width: int) -> None:
    gate_up = 4 * tokens(count, 2 * width, dtype, 1)
    gated = torch.empty(count, width, dtype=dtype)
    kernels_of(dtype).swiglu(as_array(gate_up), as_array(gated))
    gate, up = gate_up.float().chunk(2, dim=-1)
    torch.testing.assert_close(gated.float(), F.silu(gate) * up, rtol=rounding(dtype), atol=1e-6)


def test_swiglu_of_gates_from_the_smallest_to_the_largest_is_exact_to_a_few_units() -> None:
    gates = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([-1e4, -0.0, 0.0, 1e-40, 1e4, 3e38])])
    gated = torch.empty(1, len(gates))
    gate_up = torch.cat([gates, torch.ones_like(gates)])[None]
    kernels_of(torch.float32).swiglu(as_array(gate_up), as_array(gated))
    wanted = F.silu(gates.double()).float()
    torch.testing.assert_close(gated[0], wanted, rtol=1e-6, atol=1e-33)


@DTYPES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_norms_and_gates_of_inputs_that_are_not_finite_are_not_finite(
    dtype: torch.dtype, value: float, width: int
) -> None:
    x = tokens(2, 2 * width, dtype, 1)
    x[1, 0] = value
    normed, gated = torch.empty_like(x), torch.empty(2, width, dtype=dtype)
    kernels = kernels_of(dtype)
    kernels.swiglu(as_array(x), as_array(gated))
    zeros, ones = torch.zeros_like(x), torch.ones(2 * width, dtype=dtype)
    kernels.add_and_norm(as_array(x), as_array(zeros), as_array(ones), np.float32(1e-5), as_array(normed))
    assert gated[0].isfinite().all()
    assert normed[0].isfinite().all()
    assert not gated[1, 0].isfinite()
    assert not normed[1, 0].isfinite()


def panels(weight: Tensor) -> Any:
    """Pack a weight [outputs, inputs] as `cpu_kernels.linear_rows` describes."""
    outputs, inputs = weight.shape
    pairs = as_array(weight).view(np.uint32)  # [outputs, inputs / 2]
    return pairs.reshape(outputs // PANEL, PANEL, inputs // 2).transpose(0, 2, 1).copy()


@pytest.mark.parametrize(("outputs", "inputs"), [(PANEL, 2), (PANEL, 34), (3 * PANEL, 64), (8 * PANEL, 1000)])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_linear_rows_multiplies_each_row_by_the_weight(outputs: int, inputs: int, count: int) -> None:
    x, weight = tokens(count, inputs, torch.bfloat16, 1), tokens(outputs, inputs, torch.bfloat16, 2)
    kernel, result = kernels_of(torch.bfloat16).linear_rows, torch.empty(count, outputs, dtype=torch.bfloat16)
    assert kernel is not None
    kernel(panels(weight), as_array(x), as_array(result))
    error = rounding(torch.bfloat16)
    torch.testing.assert_close(result.float(), F.linear(x.float(), weight.float()), rtol=error, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_linear_rows_of_an_input_that_is_not_finite_are_not_finite(value: float) -> None:
    x, weight = tokens(2, 6, torch.bfloat16, 1), tokens(PANEL, 6, torch.bfloat16, 2)
    x[1, 3] = value
    kernel, result = kernels_of(torch.bfloat16).linear_rows, torch.empty(2, PANEL, dtype=torch.bfloat16)
    assert kernel is not None
    kernel(panels(weight), as_array(x), as_array(result))
    assert result[0].isfinite().all()
    assert not result[1].isfinite().any()


def test_there_is_no_kernel_for_matrix_products_in_float32() -> None:
    assert kernels_of(torch.float32).linear_rows is None


onednn = pytest.mark.skipif(not has_fast_bfloat16(), reason="this CPU uses other layers for bfloat16")


@onednn
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(PANEL, 64), (768, 768), (2304, 768), (4096, 768), (768, 2048), (3200, 66)]
)
def test_a_packed_weight_is_read_in_its_layout_or_not_at_all(outputs: int, inputs: int) -> None:
    weight = tokens(outputs, inputs, torch.bfloat16, 1)
    layer = OneDNNLinear(weight, None)  # it owns the memory of the panels
    assert layer.panels is None or np.array_equal(layer.panels, panels(weight))


@onednn
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(PANEL + 1, 64), (PANEL // 2, 64), (PANEL, 63), (PANEL, 1), (100, 300)]
)
def test_weights_of_other_shapes_are_multiplied_by_onednn(outputs: int, inputs: int) -> None:
    layer = OneDNNLinear(tokens(outputs, inputs, torch.bfloat16, 1), None)
    assert layer.panels is None
    assert layer(tokens(2, inputs, torch.bfloat16, 2)).shape == (2, outputs)


@onednn
def test_layers_with_a_bias_or_in_float32_are_multiplied_by_onednn() -> None:
    weight = tokens(PANEL, 64, torch.bfloat16, 1)
    assert OneDNNLinear(weight, torch.ones(PANEL, dtype=torch.bfloat16)).panels is None
    assert OneDNNLinear(weight.float(), None).panels is None


@onednn
def test_a_packed_weight_in_another_layout_is_multiplied_by_onednn() -> None:
    weight = tokens(2 * PANEL, 64, torch.bfloat16, 1)
    assert panels_of(weight.to_mkldnn(), weight) is None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
    other = weight.clone()
    other[-1, -1] += 1
    assert panels_of(packed, other) is None
