"""Measure generation on an idle CPU, and while another program keeps one core busy.

`make bench` measures all engines while a busy loop runs. It also measures our engine with different numbers
of threads: as the engine chooses, fixed at one, or fixed at the number of cores. `python -m
benchmarks.busy_cpu` measures only our engine, and updates the committed results. Knows settings and times;
knows nothing about how the engine chooses.
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
from benchmarks.attempts import Attempts, log
from benchmarks.machine import describe, usable_cores
from benchmarks.process import PeerProcess, Spec
from benchmarks.report import write_report
from benchmarks.scenarios import Row, figures, fresh, in_rounds, wait_until_idle, warm_up
from benchmarks.tables import counted
from benchmarks.targets import BENCHMARK_MODEL, CHOSEN, EMBEDDED_MODEL, evaluate
from benchmarks.workload import OUT
from llama import ROOT
from llama.settings import Settings
from llama.weights.embedded import embedded_folder

CONCURRENCY: tuple[int, ...] = (1, 8)
ROUNDS = 3
SETTLE = 2.0  # seconds that the engine has to adapt after a busy loop has started or ended

Speeds = dict[str, float]
"""Tokens per second, by setting: `CHOSEN`, or a number of threads."""


def measure(attempts: Attempts, benchmark_model: Path, peers_log: Path) -> dict[str, Any]:
    """Return a description of the machine, and speeds by model, number of requests and state of the CPU.

    If a model fails with one of the settings, it is left out.
    """
    speeds = {}
    for name in (BENCHMARK_MODEL, EMBEDDED_MODEL):
        scenario = f"threads, {name}"
        found = attempts.attempt(scenario, "busy CPU", _measure_model, name, benchmark_model, peers_log)
        if found is not None:
            speeds[name] = found
    return {"machine": describe(), "speeds": speeds} if speeds else {}


def beside_busy_loop(attempts: Attempts, peers: Sequence[PeerProcess], batch: int) -> dict[str, Row]:
    """Measure `batch` requests that arrive together while one busy loop runs. Return one row per peer."""

    def one(peer: PeerProcess) -> Row:
        wait_until_idle(peer.spec.name)
        with _busy_loop():
            _settle(peer, batch)
            requests = [fresh() for _ in range(batch)]
            return figures(requests, peer.run(requests))

    # A peer whose threads spin while they wait, such as vLLM, needs half a minute for one round.
    title = f"busy CPU, {counted(batch, 'request')}"
    return in_rounds(attempts, peers, title, one, rounds=ROUNDS, at_least=1)


def _measure_model(name: str, benchmark_model: Path, peers_log: Path) -> dict[str, dict[str, Speeds]]:
    if name == BENCHMARK_MODEL:
        folder, dtype, batches = benchmark_model, "bfloat16", CONCURRENCY
    else:
        folder, dtype, batches = embedded_folder(Settings().cache_dir), "auto", CONCURRENCY[:1]
    cores = usable_cores()
    threads = {CHOSEN: None, "1": 1, str(cores): cores}
    with ExitStack() as stack:
        peers = [
            stack.enter_context(PeerProcess(_spec(setting, count, folder, dtype), peers_log))
            for setting, count in threads.items()
        ]
        for peer in peers:
            warm_up(peer)
        return {str(batch): _measure_batch(peers, batch) for batch in batches}


def _spec(name: str, threads: int | None, folder: Path, dtype: str) -> Spec:
    variables = {"LLAMA_DTYPE": dtype, "LLAMA_DEVICE": "cpu", "LLAMA_MAX_CONTEXT": "1024"}
    if threads is not None:
        variables["LLAMA_THREADS"] = str(threads)
    return Spec(name, "benchmarks.peers.ours", str(folder), variables)


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
    _settle(peer, batch)
    requests = [fresh() for _ in range(batch)]
    return float(figures(requests, peer.run(requests))["tokens_per_second"])


def _settle(peer: PeerProcess, batch: int) -> None:
    started = time.monotonic()
    while time.monotonic() - started < SETTLE:
        peer.run([fresh(16, new_tokens=16) for _ in range(batch)])


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
    OUT.mkdir(exist_ok=True)
    model = OUT / "llama-134m"
    workload.write_model(model)
    results = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    results["busy_cpu"] = measure(Attempts(), model, OUT / "peers.log")
    results["targets"] = evaluate(results)
    write_report(results, stem)


if __name__ == "__main__":
    main()
