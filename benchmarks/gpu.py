"""`make bench-gpu`: measure a random Llama 2 70B on one GPU, in NF4, int8 and, if the GPU supports it, FP8.

First, compare the tokens of a small model, generated with CUDA graphs, with those of the CPU. Then measure
each precision in a separate process; the weights are made layer by layer on the GPU. Finally, write a packed
folder to the disk and serve it with Cog's server. The results are written as JSON, which is also the last
line of the output.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu_model import SMALL
from benchmarks.gpu_serving import serve_packed
from benchmarks.gpu_steps import measure
from benchmarks.machine import describe
from llama import ROOT
from llama.model.placement import Placement
from llama.model.precision_plan import LLAMA_2_70B
from llama.model.quantized_layers import Quantization
from llama.sampling_params import SamplingParams
from llama.torch_engine.batch import Batch
from llama.torch_engine.engine import TorchEngine
from llama.torch_engine.kv_cache import CacheShape, KVCache
from llama.torch_engine.layers import take_apart


def main() -> None:
    arguments = _arguments()
    device = torch.device(arguments.device)
    if arguments.quantization:
        print(json.dumps(measure(_config(arguments), arguments.quantization, device)))
        return
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": describe(),
        "device": _describe(device),
        "torch": torch.__version__,
        "tokens": check_tokens(device),
        "precisions": {name: _in_a_process(name, arguments) for name in _precisions(device)},
    }
    _write(results, arguments.results)  # so that these results are kept if serving fails
    with tempfile.TemporaryDirectory(dir=arguments.disk) as folder:
        results["packed"] = serve_packed(_config(arguments), Path(folder) / "packed", device)
    _write(results, arguments.results)
    print(json.dumps(results))
    failed = [name for name, row in results["precisions"].items() if "error" in row]
    failed += results["tokens"]["different"]
    if failed:
        sys.exit("\n".join(["failed:", *failed]))


def _write(results: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda:0", help="the device to measure (default: %(default)s)")
    parser.add_argument(
        "--small", action="store_true", help="use a model of two layers, to test this program"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "gpu.json",
        help="the file to write the results to (default: %(default)s)",
    )
    parser.add_argument("--disk", type=Path, help="a folder on a disk with 45 GB free, for the packed 70B")
    parser.add_argument("--quantization", help=argparse.SUPPRESS)
    return parser.parse_args()


def _config(arguments: argparse.Namespace) -> LlamaConfig:
    return SMALL if arguments.small else LLAMA_2_70B


def _precisions(device: torch.device) -> Iterator[Quantization]:
    yield from ("nf4", "int8")
    if device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9):
        yield "fp8"


def _in_a_process(quantization: Quantization, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one precision in a separate process.

    Its GPU memory is released before the next precision starts, and a failure ends only this process.
    """
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", arguments.device]
    command += ["--quantization", quantization, *(["--small"] if arguments.small else [])]
    print(f"measuring {quantization} ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"error": f"exit code {done.returncode}; see the output above"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _describe(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"name": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    cudnn: Callable[[], int | None] = torch.backends.cudnn.version
    return {
        "name": properties.name,
        "memory": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": cudnn(),
    }


def check_tokens(device: torch.device) -> dict[str, Any]:
    """Compare a small model's tokens, greedy and sampled, between the CPU and the device, in float32.

    On a GPU, steps are replayed from CUDA graphs.
    """
    answers = []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model = LlamaForCausalLM(SMALL).float().eval().requires_grad_(False).to(place)
        answers.append(_answers(model))
    return {"requests": len(answers[0]), "different": list(_differences(*answers))}


def _differences(right: list[list[int]], answers: list[list[int]]) -> Iterator[str]:
    for index, (wanted, got) in enumerate(zip(right, answers, strict=True)):
        if wanted != got:
            at = next(i for i, pair in enumerate(zip(wanted, got, strict=True)) if len(set(pair)) == 2)
            yield (
                f"request {index} ({'sampled' if index % 2 else 'greedy'}) differs from token {at} on: "
                f"{got[at:]} on the device, {wanted[at:]} on the CPU"
            )


def _answers(model: LlamaForCausalLM) -> list[list[int]]:
    """Return the tokens of 12 requests of different lengths. Every other request is sampled."""
    engine = _engine(model, CacheShape(8, 256))
    try:
        streams = []
        for index in range(12):
            prompt = torch.randint(3, 1000, (5 + 7 * index,), generator=_generator(index)).tolist()
            sampled = {"temperature": 0.8, "top_p": 0.9, "seed": index} if index % 2 else {"temperature": 0.0}
            streams.append(engine.submit(prompt, SamplingParams(max_new_tokens=40, **sampled)))
        return [[token for tokens in stream for token in tokens] for stream in streams]
    finally:
        engine.close()


def _engine(model: LlamaForCausalLM, shape: CacheShape) -> TorchEngine:
    placement = Placement(model.device, model.dtype, "none", shape.length)

    def load() -> Batch:
        cache = KVCache(model.config, shape, placement.cache_dtype, placement.device)
        batch = Batch(
            take_apart(model, placement),
            cache,
            vocabulary=model.config.vocab_size,
            eos_token_ids=[],
            prefix_reuse=False,
        )
        if placement.device.type == "cuda":
            batch.capture_graphs()
        return batch

    return TorchEngine(load)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


if __name__ == "__main__":
    main()
