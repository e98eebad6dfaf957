"""Compare the memory that is used on a GPU with the plan, and check the errors when memory runs out.

Knows the free memory of a GPU; `llama/model/gpu_reserve.py` calculates the plan.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.gpu.device import free_memory, release_memory, wait
from benchmarks.gpu.random_model import SMALL, placement_of, random_model, write_packed
from benchmarks.gpu.results import CheckFailed, Measurements, Skipped
from benchmarks.gpu.steps import Stepper
from llama.errors import DoesNotFit
from llama.model.gpu_reserve import GpuReserve, gpu_reserve, graph_shapes
from llama.model.placement import Placement
from llama.model.precision_plan import bytes_of_weights, bytes_per_token
from llama.torch_engine.batch import Batch
from llama.torch_engine.engine import TorchEngine
from llama.torch_engine.kv_cache import CacheShape, KVCache, fit_cache
from llama.torch_engine.layer_packing import load_parts
from llama.torch_engine.layers import ModelParts, take_apart
from llama.torch_engine.rows import Rows
from llama.torch_engine.runner import Runner

_SHAPE = CacheShape(32, 4096)


def served_shape(config: LlamaConfig, placement: Placement, wanted: CacheShape) -> CacheShape:
    """Return the shape of the cache that the engine would create after the weights are loaded."""
    if placement.device.type == "cpu":
        return wanted
    release_memory(placement.device)
    budget = free_memory(placement.device) - _reserve(config, placement, wanted).total
    return fit_cache(
        config, placement.cache_dtype, budget=max(budget, 0), context=wanted.length, rows=wanted.rows
    )


def capture(stepper: Stepper) -> dict[str, Any]:
    """Capture the graphs. Return their number, and the seconds and bytes that capturing them takes.

    The bytes include those that the steps before each capture allocate.
    """
    device, shape, placement = stepper.device, stepper.shape, stepper.placement
    if device.type == "cpu":
        raise Skipped("a CPU has no CUDA graphs")
    batch_sizes, lengths = graph_shapes(shape.rows, shape.length, flash_attention=placement.flash_attention)
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
        "bytes_calculated": _reserve(stepper.config, placement, shape).graphs,
    }


def used_memory(stepper: Stepper, free_at_first: int) -> dict[str, Any]:
    """Compare the memory in use with the plan. Call it after the largest steps.

    `free_at_first` is the free memory before the weights were made. Memory that torch's allocator keeps
    counts as used, so the result is the peak since memory was last released.
    """
    device, shape = stepper.device, stepper.shape
    if device.type == "cpu":
        raise Skipped("the memory of a CPU is not planned")
    wait(device)
    used = free_at_first - free_memory(device)
    weights, cache, reserve = planned(stepper.config, stepper.placement, shape)
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


def planned(config: LlamaConfig, placement: Placement, shape: CacheShape) -> tuple[int, int, GpuReserve]:
    """Return the calculated bytes of the weights and of a cache of this shape, and the reserve."""
    return (
        bytes_of_weights(config, placement.quantization),
        shape.rows * shape.length * bytes_per_token(config, placement.cache_dtype),
        _reserve(config, placement, shape),
    )


def _reserve(config: LlamaConfig, placement: Placement, shape: CacheShape) -> GpuReserve:
    return gpu_reserve(
        config,
        placement.quantization,
        placement.arithmetic,
        rows=shape.rows,
        context=shape.length,
        flash_attention=placement.flash_attention,
    )


def check_memory_errors(measurements: Measurements, device: torch.device) -> None:
    """Check that a lack of memory is reported as DoesNotFit, at each stage of the start of an engine.

    torch's allocator is told to take no more memory. Run it in a process of its own: after the last stage, a
    failed capture, torch cannot be used any more.
    """
    stages = {"weights": _load_weights, "cache": _create_cache, "graphs": _capture_graphs}
    for name, start in stages.items():
        measurements.take(f"lack of memory for {name}", partial(_check_error, device, start))


def _check_error(device: torch.device, start: Callable[[Placement], object]) -> str:
    """Return the message of the error. Raises CheckFailed if it is another error, or none."""
    if device.type != "cuda":
        raise Skipped("the memory of a CPU is not limited")
    try:
        start(placement_of(SMALL, device, "none", "auto", _SHAPE.length))
    except DoesNotFit as error:
        return error.message
    except Exception as error:
        raise CheckFailed(f"the error is {type(error).__name__}: {error}") from error
    raise CheckFailed("there was no error")


@contextmanager
def _no_more_memory(device: torch.device) -> Iterator[None]:
    """Let torch's allocator take no more memory than it has now."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(device) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _load_weights(placement: Placement) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_packed(SMALL, "none", folder, placement.device)
        release_memory(placement.device)
        # torch keeps 2 MiB for this and other small tensors, such as those of the rotary embedding, which is
        # created before any weight is loaded.
        small = torch.zeros(1, device=placement.device)
        with _no_more_memory(placement.device):
            load_parts(folder, SMALL, placement)
        del small


def _create_cache(placement: Placement) -> None:
    def load() -> Batch:
        parts = _parts(placement)
        release_memory(placement.device)
        with _no_more_memory(placement.device):
            cache = KVCache.for_placement(SMALL, _SHAPE, placement)
        return _batch(parts, cache)

    TorchEngine(load).close()


def _capture_graphs(placement: Placement) -> None:
    def load() -> Batch:
        cache = KVCache.for_placement(SMALL, _SHAPE, placement)
        parts = _parts(placement)
        batch = _batch(parts, cache)
        release_memory(placement.device)
        # torch keeps the memory of this step for the one before each capture. The captures need more.
        Runner(parts, Rows(cache)).decode(_SHAPE.rows, _SHAPE.length)
        with _no_more_memory(placement.device):
            batch.prepare_gpu(graphs=True)
        return batch

    TorchEngine(load).close()


def _parts(placement: Placement) -> ModelParts:
    return take_apart(random_model(SMALL, "none", placement.device, placement.dtype), placement)


def _batch(parts: ModelParts, cache: KVCache) -> Batch:
    return Batch(parts, cache, vocabulary=SMALL.vocab_size, eos_token_ids=[])
