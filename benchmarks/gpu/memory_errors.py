"""Check that a lack of GPU memory is reported as DoesNotFit, at each stage of the start of an engine.

torch's allocator is told to take no more memory. Run it in a process of its own: after a failed capture,
torch cannot be used any more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from benchmarks.gpu.device import release_memory
from benchmarks.gpu.measurements import CheckFailed, Measurements, Skipped
from benchmarks.gpu.random_model import SMALL, random_model, write_packed
from benchmarks.gpu.stepper import make_cache, placement_of
from llama.errors import DoesNotFit
from llama.model.placement import Placement
from llama.torch_engine.batch import Batch
from llama.torch_engine.engine import TorchEngine
from llama.torch_engine.kv_cache import CacheShape
from llama.torch_engine.layer_packing import load_parts
from llama.torch_engine.layers import take_apart
from llama.torch_engine.rows import Rows
from llama.torch_engine.runner import Runner

_SHAPE = CacheShape(32, 4096)


def check_memory_errors(measurements: Measurements, device: torch.device) -> None:
    """Check all stages. The last one makes torch unusable."""
    stages: dict[str, Callable[[Placement], object]] = {
        "weights": _load_weights,
        "cache": _create_cache,
        "graphs": _capture_graphs,
    }
    for name, start in stages.items():
        measurements.take(f"lack of memory for {name}", partial(_check, device, start))


def _check(device: torch.device, start: Callable[[Placement], object]) -> str:
    """Return the message of the error. Raises CheckFailed if it is another error, or none."""
    if device.type != "cuda":
        raise Skipped("the memory of a CPU is not limited")
    placement = placement_of(SMALL, device, "none", "auto", _SHAPE.length)
    try:
        start(placement)
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
        parts = take_apart(_model(placement), placement)
        release_memory(placement.device)
        with _no_more_memory(placement.device):
            cache = make_cache(SMALL, _SHAPE, placement)
        return Batch(parts, cache, vocabulary=SMALL.vocab_size, eos_token_ids=[])

    TorchEngine(load).close()


def _capture_graphs(placement: Placement) -> None:
    def load() -> Batch:
        cache = make_cache(SMALL, _SHAPE, placement)
        parts = take_apart(_model(placement), placement)
        batch = Batch(parts, cache, vocabulary=SMALL.vocab_size, eos_token_ids=[])
        release_memory(placement.device)
        # torch keeps the memory of this step for the one before each capture. The captures need more.
        Runner(parts, Rows(cache)).decode(_SHAPE.rows, _SHAPE.length)
        with _no_more_memory(placement.device):
            batch.capture_graphs()
        return batch

    TorchEngine(load).close()


def _model(placement: Placement) -> LlamaForCausalLM:
    return random_model(SMALL, "none", placement.device, placement.dtype)
