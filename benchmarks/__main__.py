"""`make bench`: measure the same workload on our engine and on its peers, in one run.

llama.cpp and vLLM are measured if `--llama-cpp` and `--vllm` name a Python interpreter that has them. The
results are written as JSON, Markdown and charts; the JSON is also the last line of the output.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import busy_cpu, cold_start, scenarios, workload
from benchmarks.machine import describe
from benchmarks.process import CannotDo, PeerProcess, Spec
from benchmarks.report import write_report
from benchmarks.targets import OURS, SERVED, SERVED_ON_VLLM, VLLM_SERVER, evaluate
from llama import ROOT

_REUSE_PREFIXES = ("ours", "served", "vllm_cpu", "vllm_server")
"""The modules of peers that reuse the keys and values of earlier prompts."""

_OUT = ROOT / "benchmarks" / "out"


def main() -> None:
    arguments = _arguments()
    started = time.monotonic()
    _OUT.mkdir(exist_ok=True)
    model = _OUT / "llama-134m"
    workload.write_model(model)
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "machine": describe(),
        "workload": {
            "parameters": _parameters(model),
            "prompt_tokens": workload.PROMPT_TOKENS,
            "new_tokens": workload.NEW_TOKENS,
        },
        "linears": _linears(),
    }
    with ExitStack() as stack:
        specs = [*_specs(model, arguments)]
        if arguments.llama_cpp:
            specs += _specs_of_llama_cpp(model, arguments.llama_cpp)
        peers = [peer for spec in specs if (peer := _start(stack, spec)) is not None]
        results["not_measured"] = sorted({s.name for s in specs} - {peer.spec.name for peer in peers})
        results["versions"] = {peer.spec.name: peer.versions for peer in peers}
        results["seconds_to_load"] = {peer.spec.name: peer.seconds_to_load for peer in peers}
        results |= _measure(peers)
    results |= _starts(arguments)
    results["busy_cpu"] = busy_cpu.measure(model, _OUT / "peers.log")
    results["minutes"] = (time.monotonic() - started) / 60
    results["targets"] = evaluate(results)
    write_report(results, arguments.results)
    print(json.dumps(results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="a Python interpreter with llama-cpp-python")
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python interpreter with vllm-cpu and cog")
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "cpu",
        help="the path of the results, without a suffix (default: %(default)s)",
    )
    return parser.parse_args()


def _specs(model: Path, arguments: argparse.Namespace) -> Iterator[Spec]:
    for dtype in ("bfloat16", "float32"):
        variables = {"LLAMA_DTYPE": dtype, "LLAMA_DEVICE": "cpu"}
        yield Spec(f"our engine, {dtype}", "ours", str(model), variables)
        if dtype == "bfloat16":
            yield Spec(SERVED, "served", str(model), variables)
            if arguments.vllm:
                # A context of 2,048 tokens fits the workload's prompts, and both servers then read the same
                # number of tokens per step. At 4,096, ours would read 4,096, because it turns off chunked
                # prefill on a CPU; vLLM's server would read 2,048.
                alike = {"LLAMA_DTYPE": dtype, "LLAMA_MAX_CONTEXT": "2048"}
                on_vllm = {**alike, "LLAMA_ENGINE": "vllm"}
                yield Spec(SERVED_ON_VLLM, "served", str(model), on_vllm, arguments.vllm)
                yield Spec(VLLM_SERVER, "vllm_server", str(model), alike, arguments.vllm)
        yield Spec(f"transformers generate, {dtype}", "transformers_generate", str(model), variables)
        yield Spec(
            f"transformers continuous batching, {dtype}", "transformers_continuous", str(model), variables
        )
        if arguments.vllm:
            yield Spec(
                f"vLLM engine (CPU, eager), {dtype}", "vllm_cpu", str(model), variables, arguments.vllm
            )


def _specs_of_llama_cpp(model: Path, python: str) -> Iterator[Spec]:
    from gguf import GGMLQuantizationType as Kind

    from benchmarks.to_gguf import write_gguf

    for kind in (Kind.BF16, Kind.Q4_0):
        path = model.with_suffix(f".{kind.name.lower()}.gguf")
        write_gguf(model, path, kind)
        yield Spec(f"llama.cpp, {kind.name.lower()}", "llama_cpp_batch", str(path), python=python)


def _start(stack: ExitStack, spec: Spec) -> PeerProcess | None:
    """Start and warm up a peer. Return None if it cannot run on this machine."""
    try:
        peer = stack.enter_context(PeerProcess(spec, _OUT / "peers.log"))
        scenarios.warm_up(peer)
    except CannotDo as reason:
        scenarios.log(f"{spec.name}: skipped ({reason})")
        return None
    scenarios.log(f"{spec.name}: loaded in {peer.seconds_to_load:.1f} s")
    return peer


def _measure(peers: Sequence[PeerProcess]) -> dict[str, Any]:
    by_name = {peer.spec.name: peer for peer in peers}
    ours = by_name[OURS]
    with_reuse = [peer for peer in peers if peer.spec.module in _REUSE_PREFIXES]
    return {
        "throughput": {str(batch): scenarios.throughput(peers, batch) for batch in scenarios.CONCURRENCY},
        "beside_vllm": _beside_vllm(by_name),
        "arriving": scenarios.arriving(peers, 32),
        "long_prompt_beside": scenarios.long_prompt_beside(ours, streams=8),
        "next_turn": {peer.spec.name: scenarios.next_turn(peer) for peer in with_reuse},
        "soak": scenarios.soak(ours),
    }


def _beside_vllm(by_name: Mapping[str, PeerProcess]) -> dict[str, dict[str, scenarios.Row]]:
    """Compare our server on vLLM with the vLLM server. Return nothing unless both are running."""
    pair = [by_name[name] for name in (SERVED_ON_VLLM, VLLM_SERVER) if name in by_name]
    if len(pair) < 2:
        return {}
    return {str(batch): scenarios.side_by_side(pair, batch) for batch in scenarios.CONCURRENCY}


def _starts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure cold starts and loading. All peers must have ended."""
    one, four = _OUT / "llama-1gb", _OUT / "llama-4gb"
    workload.write_large(one, layers=8)
    workload.write_large(four, layers=40)
    rows = {
        "our server, embedded model": cold_start.cold_start(None),
        "our server, 1 GB model": cold_start.cold_start(one),
    }
    peers = [
        spec
        for spec in _specs(one, arguments)
        if spec.module in ("transformers_generate", "vllm_cpu") and spec.name.endswith("bfloat16")
    ]
    for spec in peers:
        rows[f"{spec.name}, no server, 1 GB model"] = cold_start.cold_start_of_peer(spec, _OUT / "peers.log")
    return {
        "cold_start": rows,
        "load": {
            quantization: cold_start.load(four, quantization) for quantization in ("none", "int8", "nf4")
        },
    }


def _linears() -> dict[str, dict[str, float]]:
    """Measure kernels in a separate process, so that its threads have ended when the peers start."""
    scenarios.log("measuring one linear layer with each kernel")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.linears"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


def _parameters(model: Path) -> int:
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", framework="pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
