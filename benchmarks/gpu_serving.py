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

from benchmarks.gpu_model import write_packed
from llama import ROOT
from llama.model.precision_plan import bytes_of_weights, bytes_per_token
from llama.model.quantized_layers import Quantization
from llama.serving.schema import write_schema
from llama.serving.server import CogServer
from predict import Predictor

_QUANTIZATION: Quantization = "nf4"


def serve_packed(config: LlamaConfig, folder: Path, device: torch.device) -> dict[str, Any]:
    """Write the folder and serve it. Return times in seconds and sizes in bytes."""
    started = time.perf_counter()
    write_packed(config, _QUANTIZATION, folder, device)
    writing = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.empty_cache()
    write_schema(Predictor.run, ROOT)
    free = _free(device)
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        with CogServer({"LLAMA_WEIGHTS": str(folder), "LLAMA_DEVICE": str(device)}, output=output) as server:
            server.wait_until_ready()
            ready = time.perf_counter() - started
            inputs = {"prompt": "t00300", "temperature": 0, "max_new_tokens": 64, "min_new_tokens": 64}
            events = server.stream(inputs)
            first = next(time.perf_counter() - started for name, _ in events if name == "output")
            (completed,) = (data for name, data in events if name == "completed")
            used = free - _free(device)
        output.seek(0)
        log = output.read().decode(errors="replace")
    context, requests = map(int, re.search(r"context (\d+) tokens, room for (\d+) requests", log).groups())  # type: ignore[union-attr]
    per_token = bytes_per_token(config, torch.bfloat16)
    planned = bytes_of_weights(config, _QUANTIZATION) + requests * context * per_token
    return {
        "quantization": _QUANTIZATION,
        "bytes_on_disk": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "writing": writing,
        "ready": ready,
        "first_token": first,
        "setup": re.search(r"ready after (.*)", log)[1],  # type: ignore[index]
        "tokens_per_second": completed["metrics"]["tokens_per_second"],
        "requests_at_once": requests,
        "planned_bytes": planned,
        "used_bytes": used if device.type == "cuda" else None,
        "used_over_planned": used / planned if device.type == "cuda" else None,
    }


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
