"""The GPU memory that is reserved in addition to weights and cache, compared with runs on fake CUDA tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fake_cuda.kernel_costs import H100, T4, Card
from fake_cuda.models import placement_of, step_of, token_ids
from fake_cuda.session import fake_cuda
from transformers import LlamaConfig

from llama.model.gpu_reserve import (
    MOST_PROMPT_TOKENS,
    GpuReserve,
    doubling,
    gpu_reserve,
    graph_shapes,
    launches_of_step,
)
from llama.model.precision_plan import LLAMA_2_70B
from llama.model.quantized_layers import Quantization
from llama.torch_engine.attention import Chunk

MIB = 2**20
PRECISIONS: list[Quantization] = ["none", "fp8", "int8", "nf4"]
BYTES_PER_LAUNCH = 65536


def reserve(quantization: Quantization, config: LlamaConfig = LLAMA_2_70B, **more: Any) -> GpuReserve:
    limits = {"rows": 32, "context": 4096, "flash_attention": True, **more}
    return gpu_reserve(config, quantization, limits.pop("dtype", torch.bfloat16), **limits)


def with_layers(count: int) -> LlamaConfig:
    config = copy.copy(LLAMA_2_70B)
    config.num_hidden_layers = count
    return config


@pytest.mark.parametrize(
    ("first", "last", "sizes"),
    [
        (1, 1, [1]),
        (1, 9, [1, 2, 4, 8, 9]),
        (1, 32, [1, 2, 4, 8, 16, 32]),
        (256, 100, [100]),
        (256, 4096, [256, 512, 1024, 2048, 4096]),
        (256, 3000, [256, 512, 1024, 2048, 3000]),
    ],
)
def test_sizes_double_up_to_the_largest(first: int, last: int, sizes: list[int]) -> None:
    assert doubling(first, last) == sizes


def test_flash_attention_needs_one_graph_for_each_batch_size() -> None:
    batch_sizes, lengths = graph_shapes(32, 4096, flash_attention=True)
    assert (len(batch_sizes), lengths) == (6, [4096])
    batch_sizes, lengths = graph_shapes(32, 4096, flash_attention=False)
    assert len(batch_sizes) * len(lengths) == 30


@pytest.mark.parametrize("quantization", PRECISIONS)
@pytest.mark.parametrize(("flash_attention", "graphs"), [(True, 6), (False, 30)])
def test_every_launch_of_every_graph_takes_64_kib(
    quantization: Quantization, flash_attention: bool, graphs: int
) -> None:
    """Only the number of launches depends on the number of layers."""
    one, two = (reserve(quantization, with_layers(n), flash_attention=flash_attention) for n in (1, 2))
    launches = launches_of_step(with_layers(2), quantization) - launches_of_step(with_layers(1), quantization)
    assert two.graphs - one.graphs == launches * graphs * BYTES_PER_LAUNCH
    assert (two.activations, two.workspaces) == (one.activations, one.workspaces)


@pytest.mark.parametrize(
    ("quantization", "dtype", "flash_attention", "prefill", "decode"),
    [
        # MiB that a run of the engine on fake tensors counted: for a prefill of the last 1,024 of 4,096 tokens,
        # and for a decode step of 32 requests.
        ("none", torch.bfloat16, True, 344, 10),
        ("fp8", torch.bfloat16, True, 344, 10),
        ("fp8", torch.float16, True, 352, 11),
        ("int8", torch.bfloat16, True, 408, 12),
        ("nf4", torch.bfloat16, True, 680, 452),
        ("none", torch.float16, False, 408, 89),
        ("int8", torch.float16, False, 416, 89),
        ("nf4", torch.float16, False, 744, 89),
    ],
)
def test_the_tensors_of_a_step_fit_into_the_reserve(
    quantization: Quantization, dtype: torch.dtype, flash_attention: bool, prefill: int, decode: int
) -> None:
    planned = reserve(quantization, dtype=dtype, flash_attention=flash_attention)
    assert prefill * MIB <= planned.activations <= 1.2 * prefill * MIB
    graphs = 6 if flash_attention else 30
    tensors = planned.graphs - graphs * launches_of_step(LLAMA_2_70B, quantization) * BYTES_PER_LAUNCH
    assert decode * MIB <= tensors


@pytest.mark.parametrize(("quantization", "gib"), [("none", 1.3), ("fp8", 1.9), ("int8", 2.2), ("nf4", 2.9)])
def test_the_reserve_of_the_70b(quantization: Quantization, gib: float) -> None:
    planned = reserve(quantization)
    assert planned.total == planned.activations + planned.graphs + planned.workspaces
    assert planned.total / 2**30 == pytest.approx(gib, abs=0.06)


def test_nf4_reserves_memory_for_the_largest_unpacked_weight() -> None:
    weight = 2 * 28672 * 8192
    assert weight == 448 * MIB
    nf4, none = (reserve(quantization) for quantization in ("nf4", "none"))
    assert nf4.activations - none.activations >= weight // 2
    assert nf4.graphs - none.graphs >= weight
    assert nf4.workspaces - none.workspaces == weight - MOST_PROMPT_TOKENS * 2 * 28672 * 2


def test_fewer_requests_and_a_shorter_context_need_less() -> None:
    full = reserve("fp8")
    assert reserve("fp8", rows=8).graphs < full.graphs
    assert reserve("fp8", context=512).activations < full.activations * 0.6
    assert reserve("fp8", rows=1, context=64).total > reserve("fp8", rows=1, context=64).workspaces > 0


def test_scores_take_memory_where_torch_has_no_fused_kernel() -> None:
    even = LlamaConfig(hidden_size=3328, num_attention_heads=32)  # a head dimension of 104
    odd = LlamaConfig(hidden_size=3200, num_attention_heads=32)  # 100
    fused, plain = (
        reserve("none", config, dtype=torch.float16, flash_attention=False) for config in (even, odd)
    )
    assert plain.activations - fused.activations > 2 * 4 * 32 * 1024 * 4096


@pytest.mark.parametrize(
    ("card", "quantization", "mlp"),
    [
        (H100, "int8", 11008),
        (H100, "nf4", 11008),
        (T4, "none", 11008),
        (H100, "fp8", 2048),  # attention has more tensors than the MLP
    ],
)
def test_the_reserve_is_enough_for_other_models(card: Card, quantization: Quantization, mlp: int) -> None:
    """Two layers of the width of Llama 2 7B, which has a KV head for each query head."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=mlp,
        num_hidden_layers=2,
        num_attention_heads=32,
        max_position_embeddings=4096,
    )
    with fake_cuda(card) as fakes:
        placement = placement_of(config, quantization=quantization)
        flash_attention = placement.flash_attention
        step = step_of(config, placement, 32, 4096)
        before = fakes.memory.start_phase()
        step.runner.prefill([Chunk(0, 4096 - 1024, token_ids(1024))])
        prefill = fakes.memory.peak - before
        before, launches = fakes.memory.start_phase(), fakes.trace.count
        step.runner.decode(32, 4096)
        decode, launches = fakes.memory.peak - before, fakes.trace.count - launches
    planned = reserve(quantization, config, dtype=placement.dtype, flash_attention=flash_attention)
    graphs = 6 if flash_attention else 30
    most = launches_of_step(config, quantization)
    assert prefill <= planned.activations
    assert decode <= planned.graphs - graphs * most * BYTES_PER_LAUNCH
    assert launches <= most
