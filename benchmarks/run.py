"""Measures all scenarios, one after the other, and saves the results after each of them.

An engine that fails in one scenario is left out of the later ones, and the run goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import ParamSpec

from benchmarks import busy_cpu, cold_start, dialogue, scenarios, workload
from benchmarks.attempts import Attempts, log
from benchmarks.process import Limits, PeerProcess, Spec
from benchmarks.results_file import ResultsFile
from benchmarks.scenarios import CONCURRENCY, Row
from benchmarks.specs import Pythons, gguf_of, reuses_prefixes, specs, specs_for_dialogue
from benchmarks.targets import GENERATE, OURS, SERVED_ON_VLLM, VLLM, VLLM_SERVER
from benchmarks.workload import OUT
from llama import ROOT
from llama.settings import Settings
from llama.weights.embedded import embedded_folder

_LOG = OUT / "peers.log"
_16_BITS = (", bfloat16", ", bf16")
_Arguments = ParamSpec("_Arguments")


class Run:
    """A run of the whole benchmark with one model."""

    def __init__(self, model: Path, pythons: Pythons, attempts: Attempts, file: ResultsFile) -> None:
        self._model, self._pythons, self._attempts, self._file = model, pythons, attempts, file

    def measure(self) -> None:
        self._file.add("linears", value=self._attempts.attempt("linear layers", "one layer", _linears))
        self._write_gguf(self._model, "bf16", "q4_0")
        with ExitStack() as stack:
            peers = self._start(stack, specs(self._model, self._pythons))
            self._file.add("versions", value={peer.spec.name: peer.versions for peer in peers})
            self._file.add("seconds_to_load", value={peer.spec.name: peer.seconds_to_load for peer in peers})
            self._compare(peers)
            self._measure_caches(peers)
            self._measure_beside_busy_loop(peers)
        self._measure_dialogue()
        self._measure_starts()
        self._file.add("busy_cpu", value=busy_cpu.measure(self._attempts, self._model, _LOG))

    def _start(self, stack: ExitStack, wanted: Sequence[Spec]) -> list[PeerProcess]:
        """Start and warm up peers, which run until `stack` is closed. Return those that work."""
        peers = []
        for spec in wanted:
            peer = self._attempts.attempt(spec.name, "start", stack.enter_context, PeerProcess(spec, _LOG))
            if peer is not None:
                self._attempts.attempt(spec.name, "warm-up", scenarios.warm_up, peer)
                log(f"{spec.name}: loaded in {peer.seconds_to_load:.1f} s")
                peers.append(peer)
        return peers

    def _compare(self, peers: Sequence[PeerProcess]) -> None:
        """Measure speeds of all peers in rounds."""
        attempts, file = self._attempts, self._file
        for batch in CONCURRENCY:
            file.add("throughput", str(batch), value=scenarios.throughput(attempts, peers, batch))
        file.add("mixed_lengths", value=scenarios.mixed(attempts, peers))
        file.add("arriving", value=scenarios.arriving(attempts, peers, 32))
        pair = [peer for peer in peers if peer.spec.name in (SERVED_ON_VLLM, VLLM_SERVER)]
        if len(pair) == 2:
            for batch in CONCURRENCY:
                file.add("beside_vllm", str(batch), value=scenarios.side_by_side(attempts, pair, batch))

    def _measure_caches(self, peers: Sequence[PeerProcess]) -> None:
        """Measure what depends on the caches of engines, one engine after the other."""
        for peer in peers:
            if reuses_prefixes(peer.spec):
                self._add("next_turn", peer.spec.name, "next turn", scenarios.next_turn, peer)
        attempt = self._attempts.attempt
        for ours in (peer for peer in peers if peer.spec.name == OURS):
            beside = attempt(
                OURS, "a long prompt beside others", scenarios.long_prompt_beside, ours, streams=8
            )
            self._file.add("long_prompt_beside", value=beside)
            self._file.add("soak", value=attempt(OURS, "2,000 short requests", scenarios.soak, ours))

    def _measure_beside_busy_loop(self, peers: Sequence[PeerProcess]) -> None:
        """Measure 16-bit engines. Of the three peers that are vLLM, the fastest one is enough."""
        servers = (SERVED_ON_VLLM, VLLM_SERVER)
        some = [p for p in peers if p.spec.name.endswith(_16_BITS) and p.spec.name not in servers]
        for batch in busy_cpu.CONCURRENCY:
            rows = busy_cpu.beside_busy_loop(self._attempts, some, batch)
            self._file.add("beside_busy_loop", str(batch), value=rows)

    def _measure_dialogue(self) -> None:
        folder = self._attempts.attempt(
            "embedded model", "start", lambda: embedded_folder(Settings().cache_dir)
        )
        if folder is not None:
            self._write_gguf(folder, "bf16")
            rounds = dialogue.dialogues(folder)
            with ExitStack() as stack:
                peers = self._start(stack, specs_for_dialogue(folder, self._pythons))
                self._file.add("dialogue", value=dialogue.measure(self._attempts, peers, rounds))

    def _measure_starts(self) -> None:
        """Measure cold starts and loading. All peers must have ended."""
        one, four = OUT / "llama-1gb", OUT / "llama-4gb"
        workload.write_large(one, layers=8)
        workload.write_large(four, layers=40)
        section, scenario = "cold_start", "cold start"
        self._add(section, "our server, embedded model", scenario, cold_start.cold_start, None)
        self._add(section, "our server, 1 GB model", scenario, cold_start.cold_start, one)
        for spec in specs(one, self._pythons):
            if spec.name in (GENERATE, VLLM):
                row = self._attempts.attempt(spec.name, scenario, cold_start.cold_start_of_peer, spec, _LOG)
                self._file.add(section, f"{spec.name}, no server, 1 GB model", value=row)
        # Quantizing takes half a minute, and only loading without it has a target.
        for quantization, rounds in {"none": 3, "int8": 1, "nf4": 1}.items():
            row = self._attempts.attempt(
                f"loading, {quantization}", "loading", cold_start.load, four, quantization, rounds
            )
            self._file.add("load", quantization, value=row)

    def _add(
        self,
        section: str,
        name: str,
        scenario: str,
        measure: Callable[_Arguments, Row],
        *arguments: _Arguments.args,
        **options: _Arguments.kwargs,
    ) -> None:
        """Attempt a measurement of one engine, and add its row to a section of the results."""
        row = self._attempts.attempt(name, scenario, measure, *arguments, **options)
        self._file.add(section, name, value=row)

    def _write_gguf(self, model: Path, *kinds: str) -> None:
        """Write the model's files for llama.cpp. A kind that cannot be written is left out."""
        if self._pythons.llama_cpp:
            for kind in kinds:
                self._attempts.attempt(f"llama.cpp, {kind}", "start", _convert, model, kind)


def _convert(model: Path, kind: str) -> None:
    from gguf import GGMLQuantizationType

    from benchmarks.to_gguf import write_gguf

    write_gguf(model, gguf_of(model, kind), GGMLQuantizationType[kind.upper()])


def _linears() -> dict[str, dict[str, float]]:
    """Measure kernels in a separate process, so that its threads have ended when the peers start."""
    log("measuring one linear layer with each kernel")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.linears"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=Limits().run,
    )
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found
