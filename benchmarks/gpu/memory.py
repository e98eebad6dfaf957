"""Measure the memory of the captured graphs, and all memory that is neither weights nor cache.

Knows free memory before and after; `llama/model/gpu_reserve.py` has what was planned.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.gpu.device import free_memory, release_memory, wait
from benchmarks.gpu.measurements import Skipped
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.stepper import Stepper
from benchmarks.gpu.steps import ALL_RULES
from llama.model.gpu_reserve import GpuReserve, gpu_reserve, graph_shapes
from llama.model.placement import Placement
from llama.model.precision_plan import bytes_of_weights, bytes_per_token
from llama.torch_engine.kv_cache import CacheShape, fit_cache
from llama.torch_engine.prompt_share import MOST_PROMPT_TOKENS


def reserve_of(config: LlamaConfig, placement: Placement, shape: CacheShape) -> GpuReserve:
    """Return the calculated reserve for a cache of this shape."""
    return gpu_reserve(
        config,
        placement.quantization,
        placement.arithmetic,
        rows=shape.rows,
        context=shape.length,
        flash_attention=placement.flash_attention,
    )


def served_shape(config: LlamaConfig, placement: Placement, sizes: Sizes) -> CacheShape:
    """Return the shape of the cache that the engine would create after the weights are loaded."""
    wanted = CacheShape(sizes.rows, sizes.context)
    if placement.device.type == "cpu":
        return wanted
    release_memory(placement.device)
    budget = free_memory(placement.device) - reserve_of(config, placement, wanted).total
    return fit_cache(
        config, placement.cache_dtype, budget=max(budget, 0), context=wanted.length, rows=wanted.rows
    )


def capture(stepper: Stepper, config: LlamaConfig, placement: Placement) -> dict[str, Any]:
    """Capture the graphs. Return how many there are, and the seconds and bytes that they take.

    The bytes include what their warm-up allocates.
    """
    device = placement.device
    if device.type == "cpu":
        raise Skipped("a CPU has no CUDA graphs")
    batch_sizes, lengths = graph_shapes(
        stepper.shape.rows, stepper.shape.length, flash_attention=placement.flash_attention
    )
    release_memory(device)
    wait(device)
    before, started = free_memory(device), time.perf_counter()
    stepper.runner.capture()
    wait(device)
    seconds = time.perf_counter() - started
    release_memory(device)
    return {
        "graphs": len(batch_sizes) * len(lengths),
        "batch_sizes": batch_sizes,
        "lengths": lengths,
        "seconds": seconds,
        "bytes": before - free_memory(device),
        "bytes_calculated": reserve_of(config, placement, stepper.shape).graphs,
    }


def run_largest_steps(stepper: Stepper, sizes: Sizes) -> None:
    """Run the steps that allocate most: the longest prompt chunk, and sampling with all rules in all rows."""
    tokens = min(MOST_PROMPT_TOKENS["cuda"], stepper.shape.length)
    stepper.prefill(stepper.shape.length, tokens)
    stepper.start([sizes.short] * stepper.shape.rows, ALL_RULES)
    stepper.step()


def used_memory(
    config: LlamaConfig, placement: Placement, shape: CacheShape, free_at_first: int
) -> dict[str, Any]:
    """Compare the memory in use with the plan. Call it after the largest steps.

    `free_at_first` is the free memory before the weights were made. What torch's allocator keeps counts as
    used, so it is the peak since memory was last released.
    """
    device = placement.device
    if device.type == "cpu":
        raise Skipped("the memory of a CPU is not planned")
    wait(device)
    used = free_at_first - free_memory(device)
    weights = bytes_of_weights(config, placement.quantization)
    cache = shape.rows * shape.length * bytes_per_token(config, placement.cache_dtype)
    reserve = reserve_of(config, placement, shape)
    return {
        "rows": shape.rows,
        "context": shape.length,
        "used": used,
        "weights_calculated": weights,
        "cache_calculated": cache,
        "reserve_calculated": {**asdict(reserve), "total": reserve.total},
        "reserve_used": used - weights - cache,
        # The rest of `used` is not torch's: the driver, graphs, and what libraries allocate for themselves.
        "allocated_by_torch": torch.cuda.memory_allocated(device),
        "kept_by_torch": torch.cuda.memory_reserved(device),
    }
