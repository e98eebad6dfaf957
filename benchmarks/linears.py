"""Measure one linear layer of the workload with every kernel that the libraries have for CPUs.

The results are the reason why `llama/torch_engine/linears.py` packs weights as it does. Run as a program, it
prints one JSON document.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import usable_cores
from llama.torch_engine.linears import packed

ROWS = (1, 8, 32, 128)
WIDTH_IN, WIDTH_OUT = 768, 9216
_ROUNDS, _SECONDS_A_ROUND = 5, 0.1

Kernel = Callable[[Tensor], Tensor]


def kernels() -> dict[str, Kernel]:
    """Return the kernels by name. Each takes float32 [rows, WIDTH_IN]."""
    torch.manual_seed(0)
    weight = torch.randn(WIDTH_OUT, WIDTH_IN) * 0.02
    half = weight.bfloat16()
    dynamic: Callable[[nn.Linear], Kernel] = torch.ao.nn.quantized.dynamic.Linear.from_float
    found: dict[str, Kernel] = {
        "float32, plain": lambda x: F.linear(x, weight),
        "bfloat16, plain": lambda x: F.linear(x.bfloat16(), half),
        "float32, oneDNN packed": packed(_module(weight), torch.float32),
        "16 bits, FBGEMM": packed(_module(half), torch.float32),
        "float32, torch.compile, frozen": _compiled(weight),
        "int8 weights, _weight_int8pack_mm": _int8(weight),
        "int8, FBGEMM, dynamic": dynamic(_observed(weight)),
    }
    with suppress(RuntimeError):  # CPUs with neither AVX-512 nor AVX-NE-CONVERT do not have this kernel
        found["bfloat16, oneDNN packed"] = _bfloat16(half)
    return {**found, **_bitsandbytes(weight)}


def measure() -> dict[str, dict[str, float]]:
    """Return the microseconds per call, by kernel and number of rows. The kernels are interleaved."""
    inputs = {rows: torch.randn(rows, WIDTH_IN) for rows in ROWS}
    samples: dict[str, dict[str, list[float]]] = {}
    with torch.inference_mode():
        found = kernels()
        for _ in range(_ROUNDS):
            for name, kernel in found.items():
                for rows, x in inputs.items():
                    times = samples.setdefault(name, {}).setdefault(str(rows), [])
                    times.append(_seconds_a_call(kernel, x))
    return {
        name: {rows: round(median(times) * 1e6, 1) for rows, times in by_rows.items()}
        for name, by_rows in samples.items()
    }


def _seconds_a_call(kernel: Kernel, x: Tensor) -> float:
    kernel(x)
    started, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < _SECONDS_A_ROUND:
        kernel(x)
        calls += 1
    return spent / calls


def _module(weight: Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def _bfloat16(weight: Tensor) -> Kernel:
    kernel = packed(_module(weight), torch.bfloat16)
    return lambda x: kernel(x.bfloat16())


def _observed(weight: Tensor) -> nn.Linear:
    module = _module(weight)
    observed: Any = module  # torch's type hints allow no other attributes than tensors and modules
    observed.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return module


def _compiled(weight: Tensor) -> Kernel:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return torch.compile(_module(weight).eval())


def _int8(weight: Tensor) -> Kernel:
    scale = weight.abs().amax(dim=1) / 127
    quantized = (weight / scale[:, None]).round().to(torch.int8)
    scale = scale.bfloat16()
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), quantized, scale)


def _bitsandbytes(weight: Tensor) -> dict[str, Kernel]:
    import bitsandbytes as bnb

    nf4 = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    nf4.load_state_dict({"weight": weight})
    int8 = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    int8.load_state_dict({"weight": weight})
    nf4.eval().to("cpu")  # `to` quantizes the weights
    int8.eval().to("cpu")
    return {
        "NF4, bitsandbytes": lambda x: nf4(x.bfloat16()),
        "int8, bitsandbytes": lambda x: int8(x.half()),
    }


if __name__ == "__main__":
    torch.set_num_threads(usable_cores())
    json.dump(measure(), sys.stdout)
