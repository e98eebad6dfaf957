"""Measure generation on an idle CPU, and while another program keeps one core busy.

`python -m benchmarks.busy_cpu` measures only this, and updates the committed results. `make bench` measures
it with everything else. The number of threads is chosen by the engine, fixed at one, or fixed at the number
of cores. Knows settings and times; knows nothing about how the engine chooses.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import workload
from benchmarks.machine import describe, usable_cores
from benchmarks.process import PeerProcess, Spec
from benchmarks.report import write_report
from benchmarks.scenarios import CONCURRENCY, fresh, log, warm_up
from benchmarks.tables import counted
from benchmarks.targets import CHOSEN, evaluate
from llama import ROOT
from llama.settings import Settings
from llama.weights.embedded import embedded_folder

ROUNDS = 3
SETTLE = 2.0  # seconds that the engine has to adapt after a busy loop has started or ended

Speeds = dict[str, float]
"""Tokens per second, by setting: `CHOSEN`, or a number of threads."""


def measure(benchmark_model: Path, peers_log: Path) -> dict[str, Any]:
    """Return a description of the machine, and speeds by model, number of requests and state of the CPU."""
    models = {
        "benchmark model, bfloat16": (benchmark_model, "bfloat16"),
        "embedded model": (embedded_folder(Settings().cache_dir), "auto"),
    }
    return {
        "machine": describe(),
        "speeds": {
            name: _measure_model(folder, dtype, peers_log) for name, (folder, dtype) in models.items()
        },
    }


def _measure_model(folder: Path, dtype: str, peers_log: Path) -> dict[str, dict[str, Speeds]]:
    cores = usable_cores()
    threads = {CHOSEN: None, "1": 1, str(cores): cores}
    with ExitStack() as stack:
        peers = [
            stack.enter_context(PeerProcess(_spec(name, count, folder, dtype), peers_log))
            for name, count in threads.items()
        ]
        for peer in peers:
            warm_up(peer)
        return {str(batch): _measure_batch(peers, batch) for batch in CONCURRENCY}


def _spec(name: str, threads: int | None, folder: Path, dtype: str) -> Spec:
    variables = {"LLAMA_DTYPE": dtype, "LLAMA_DEVICE": "cpu", "LLAMA_MAX_CONTEXT": "1024"}
    if threads is not None:
        variables["LLAMA_THREADS"] = str(threads)
    return Spec(name, "ours", str(folder), variables)


def _measure_batch(peers: Sequence[PeerProcess], batch: int) -> dict[str, Speeds]:
    """Return medians over rounds, in each of which every setting is measured once per state."""
    turns: dict[str, dict[str, list[float]]] = {}
    for _ in range(ROUNDS):
        for state, neighbour in (("quiet", nullcontext()), ("busy", _busy_loop())):
            with neighbour:
                for peer in peers:
                    speeds = turns.setdefault(state, {}).setdefault(peer.spec.name, [])
                    speeds.append(_speed(peer, batch))
                    log(
                        f"{counted(batch, 'request')}, {state} CPU: {speeds[-1]:.1f} tokens/s, "
                        f"threads: {peer.spec.name}"
                    )
    return {state: {name: median(s) for name, s in by_name.items()} for state, by_name in turns.items()}


def _speed(peer: PeerProcess, batch: int) -> float:
    """Return the tokens per second of one batch, after `SETTLE` seconds of similar work."""
    started = time.monotonic()
    while time.monotonic() - started < SETTLE:
        peer.run([fresh(16) for _ in range(batch)])
    requests = [fresh() for _ in range(batch)]
    seconds = max(times[-1] for times in peer.run(requests))
    return sum(request.new_tokens for request in requests) / seconds


@contextmanager
def _busy_loop() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    stem = ROOT / "benchmarks" / "results" / "cpu"
    out = ROOT / "benchmarks" / "out"
    out.mkdir(exist_ok=True)
    model = out / "llama-134m"
    workload.write_model(model)
    results = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    results["busy_cpu"] = measure(model, out / "peers.log")
    results["targets"] = evaluate(results)
    write_report(results, stem)


if __name__ == "__main__":
    main()
