"""Serve a packed random 70B with Cog's server.

Measures the parts of a cold start, and compares the used memory with the planned memory.
"""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.gpu.device import free_memory, release_memory
from benchmarks.gpu.memory import planned
from benchmarks.gpu.random_model import SMALL, placement_of, write_packed
from benchmarks.gpu.results import CheckFailed
from llama import ROOT
from llama.model.precision_plan import LLAMA_2_70B
from llama.model.quantized_layers import Quantization
from llama.serving.schema import write_schema
from llama.serving.server import CogServer
from llama.torch_engine.kv_cache import CacheShape
from predict import Predictor

_QUANTIZATION: Quantization = "nf4"
_ROOM = re.compile(r"context (\d+) tokens, room for (\d+) requests")


def measure_serving(device: torch.device, folder: Path, *, small: bool) -> dict[str, Any]:
    """Write a model to `folder` and serve it. Return times in seconds and sizes in bytes."""
    config, packed = SMALL if small else LLAMA_2_70B, folder / "packed"
    started = time.perf_counter()
    write_packed(config, _QUANTIZATION, packed, device)
    result: dict[str, Any] = {
        "quantization": _QUANTIZATION,
        "bytes_on_disk": sum(path.stat().st_size for path in packed.glob("*.safetensors")),
        "seconds_to_write": time.perf_counter() - started,
    }
    release_memory(device)
    write_schema(Predictor.run, ROOT)
    free = free_memory(device)
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        with CogServer({"LLAMA_WEIGHTS": str(packed), "LLAMA_DEVICE": str(device)}, output=output) as server:
            server.wait_until_ready()
            result["seconds_to_ready"] = time.perf_counter() - started
            inputs = {"prompt": "t00300", "temperature": 0, "max_new_tokens": 64, "min_new_tokens": 64}
            events = server.stream(inputs)
            result["seconds_to_first_token"] = next(
                time.perf_counter() - started for name, _ in events if name == "output"
            )
            (completed,) = (data for name, data in events if name == "completed")
            result["tokens_per_second"] = completed["metrics"]["tokens_per_second"]
            used = free - free_memory(device)
        output.seek(0)
        log = output.read().decode(errors="replace")
    if setup := re.search(r"ready after ([^)]*\))", log):
        result["setup"] = setup[1]
    return {**result, **_memory(config, device, log, used)}


def _memory(config: LlamaConfig, device: torch.device, log: str, used: int) -> dict[str, Any]:
    """Compare the used memory with the plan for the cache that the server has created."""
    found = _ROOM.search(log)
    if found is None:
        raise CheckFailed(f"the server's log does not say how many requests fit:\n{log[-1000:]}")
    shape = CacheShape(rows=int(found[2]), length=int(found[1]))
    result = {"requests_at_once": shape.rows, "context": shape.length}
    if device.type == "cpu":
        return result
    placement = placement_of(config, device, _QUANTIZATION, "auto", shape.length)
    weights, cache, reserve = planned(config, placement, shape)
    # The server's process also has a CUDA context, which the plan does not include.
    return {**result, "used": used, "planned": weights + cache + reserve.total}
