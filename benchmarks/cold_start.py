"""Measure cold starts, and how long loading weights takes.

Knows processes, files and clocks; knows nothing about throughput. Run as a program, it loads one folder and
prints the seconds that this took, without imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.process import Limits, PeerProcess, Spec, time_limit
from benchmarks.protocol import Request
from benchmarks.workload import prompt
from llama import ROOT
from llama.serving.schema import write_schema
from llama.serving.server import CogServer
from predict import Predictor

_ROUNDS = 3
_LIMITS = Limits()


def cold_start(model: Path | None) -> dict[str, float]:
    """Return the seconds from the start of Cog's server to READY, and to the first token.

    `model` is a weights folder, or None for the embedded model.
    """
    write_schema(Predictor.run, ROOT)
    ready, first = list[float](), list[float]()
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        with CogServer({"LLAMA_WEIGHTS": str(model or "")}) as server:
            server.wait_until_ready()
            ready.append(time.perf_counter() - started)
            with time_limit(server.process.pid, _LIMITS.run):
                for name, _ in server.stream({"prompt": "Hi", "temperature": 0, "max_new_tokens": 4}):
                    if name == "output":
                        first.append(time.perf_counter() - started)
                        break
    return {"ready": median(ready), "first_token": median(first)}


def cold_start_of_peer(spec: Spec, log: Path) -> dict[str, float]:
    """Return the same for a peer, which has no server."""
    ready, first = list[float](), list[float]()
    for seed in range(_ROUNDS):
        started = time.perf_counter()
        with PeerProcess(spec, log) as peer:
            ready.append(time.perf_counter() - started)
            peer.run([Request(prompt(16, -1 - seed), new_tokens=1)])
            first.append(time.perf_counter() - started)
    return {"ready": median(ready), "first_token": median(first)}


def load(folder: Path, quantization: str, rounds: int) -> dict[str, Any]:
    """Return the seconds that reading the files of a checkpoint takes, and those that loading it takes."""
    files = sorted(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    reading, loading = list[float](), list[float]()
    _read(files)  # so that every measurement finds the files in the page cache
    for _ in range(rounds):
        reading.append(_seconds(lambda: _read(files)))
        command = [sys.executable, "-m", "benchmarks.cold_start", str(folder), quantization]
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=_LIMITS.run
        )
        loading.append(json.loads(done.stdout))
    return {"bytes": size, "reading": median(reading), "loading": median(loading), "rounds": rounds}


def _read(files: list[Path]) -> None:
    buffer = bytearray(2**24)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _load_here(folder: Path, quantization: Any) -> float:
    import bitsandbytes  # noqa: F401
    import torch

    from llama.model.config import load_config
    from llama.model.placement import Placement
    from llama.torch_engine.layer_packing import load_parts

    config = load_config(folder)
    placement = Placement(torch.device("cpu"), torch.bfloat16, quantization, 128)
    return _seconds(lambda: load_parts(folder, config, placement))


if __name__ == "__main__":
    print(json.dumps(_load_here(Path(sys.argv[1]), sys.argv[2])))
