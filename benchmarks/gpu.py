"""`make bench-gpu`: a random Llama 2 70B on one GPU, in every precision that fits.

Made layer by layer on the card, without a file. First a small model's tokens, graphs captured, against
those of the eager path on the CPU; then, for each precision in a process of its own, a decode step
against the time that its bytes take to read, prefill, memory, the engine's throughput, and transformers'
`generate` over the same layers. Prints one JSON document last, and writes it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.machine import describe
from llama.loader import arithmetic_dtype, empty_model
from llama.plan import LLAMA_2_70B, bytes_per_token
from llama.quantization import Quantization, quantize
from llama.sampling import SamplingParams
from llama.server import ROOT
from llama.torch_engine.engine import TorchEngine
from llama.torch_engine.kv_cache import CachePlan, KVCache
from llama.torch_engine.layers import take_apart
from llama.torch_engine.runner import Runner
from llama.torch_engine.sampler import Sampler

_HEIGHTS = (1, 4, 8, 16, 32)
_PROMPT, _NEW = 512, 64
_CONTEXT = _PROMPT + 2 * _NEW
_ROWS = 32
_CHUNK = 256

# The same proportions, to try this program itself where there is no GPU.
_SMALL = LlamaConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=896,
    num_hidden_layers=2,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=4,
    max_position_embeddings=4096,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
    initializer_range=0.2,
    dtype="bfloat16",
)


def main() -> None:
    arguments = _arguments()
    device = torch.device(arguments.device)
    if arguments.quantization:
        print(json.dumps(measure(_config(arguments), arguments.quantization, device)))
        return
    results = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": describe(),
        "device": _describe(device),
        "torch": torch.__version__,
        "tokens": check_tokens(device),
        "precisions": {name: _in_a_process(name, arguments) for name in _precisions(device)},
    }
    arguments.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results))
    failed = [name for name, row in results["precisions"].items() if "error" in row]
    if failed or not results["tokens"]["equal"]:
        sys.exit(f"failed: {', '.join(failed) or 'tokens differ'}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--small", action="store_true", help="a model of two layers, to try the program")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--quantization", help=argparse.SUPPRESS)
    return parser.parse_args()


def _config(arguments: argparse.Namespace) -> LlamaConfig:
    return _SMALL if arguments.small else LLAMA_2_70B


def _precisions(device: torch.device) -> Iterator[Quantization]:
    yield from ("nf4", "int8")
    if device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9):
        yield "fp8"


def _in_a_process(quantization: Quantization, arguments: argparse.Namespace) -> dict[str, Any]:
    """What one precision does to the card is over before the next begins; its failure too."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", arguments.device]
    command += ["--quantization", quantization, *(["--small"] if arguments.small else [])]
    print(f"{quantization} ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"error": f"exit code {done.returncode}; what it said is above"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _describe(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"name": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def check_tokens(device: torch.device) -> dict[str, Any]:
    """A small model's greedy and sampled tokens in float32: on the device, where steps are replayed from
    graphs, and on the CPU, where they are computed one by one."""
    answers = []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model = LlamaForCausalLM(_SMALL).float().eval().requires_grad_(False).to(place)
        answers.append(_answers(model))
    same = sum(a == b for a, b in zip(*answers, strict=True))
    return {"requests": len(answers[0]), "same": same, "equal": same == len(answers[0])}


def _answers(model: LlamaForCausalLM) -> list[list[int]]:
    """Of 12 requests of different lengths, every other one sampled."""
    engine = _engine(model, CachePlan(8, 256))
    try:
        streams = []
        for index in range(12):
            prompt = torch.randint(3, 1000, (5 + 7 * index,), generator=_generator(index)).tolist()
            sampled = {"temperature": 0.8, "top_p": 0.9, "seed": index} if index % 2 else {"temperature": 0.0}
            streams.append(engine.submit(prompt, SamplingParams(max_new_tokens=40, **sampled)))
        return [[token for tokens in stream for token in tokens] for stream in streams]
    finally:
        engine.close()


def _engine(model: LlamaForCausalLM, plan: CachePlan) -> TorchEngine:
    return TorchEngine(
        lambda: (model, plan), vocabulary=model.config.vocab_size, eos_token_ids=[], prefix_reuse=False
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_model(config: LlamaConfig, quantization: Quantization, device: torch.device) -> LlamaForCausalLM:
    """Random weights in their precision, each layer quantized before the next is made."""
    model = empty_model(config, device)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            shape = module.weight.shape
            weight = torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(0.02)
            module.weight = nn.Parameter(weight, requires_grad=False)
        elif hasattr(module, "variance_epsilon"):
            module.weight = nn.Parameter(torch.ones_like(module.weight, device=device), requires_grad=False)
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, quantize(module.weight, None, quantization, torch.bfloat16))
    return model


def measure(config: LlamaConfig, quantization: Quantization, device: torch.device) -> dict[str, Any]:
    """All figures of one precision; seconds, bytes, tokens per second."""
    started = time.perf_counter()
    bandwidth = copy_bandwidth(device)
    model = random_model(config, quantization, device)
    built = time.perf_counter() - started
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    embedding = model.get_input_embeddings().weight.nbytes
    generate = {height: _generate(model, height, device) for height in (1, 32)}
    per_token = bytes_per_token(config, arithmetic_dtype(torch.bfloat16, device))
    plan = CachePlan(_ROWS, _CONTEXT)
    parts = take_apart(model, plan.length)
    with torch.inference_mode():
        runner = Runner(parts, KVCache(config, plan, parts.dtype, device))
        sampler = Sampler(plan.rows, plan.length, config.vocab_size, [], device)
        steps = {height: _step(runner, sampler, height, device) for height in _HEIGHTS}
        prefill = _prefill(runner, device)
    # One row of the embedding is read a request.
    floors = {height: (weights - embedding + height * _PROMPT * per_token) / bandwidth for height in _HEIGHTS}
    return {
        "seconds_to_build": built,
        "copy_bandwidth": bandwidth,
        "bytes_of_weights": weights,
        "bytes_of_cache": plan.rows * plan.length * per_token,
        "bytes_used_at_most": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "graphs": runner.captured,
        "decode": {
            height: {
                "seconds": steps[height],
                "floor": floors[height],
                "floor_over_measured": floors[height] / steps[height],
                "tokens_per_second": height / steps[height],
            }
            for height in _HEIGHTS
        },
        "prefill_tokens_per_second": prefill,
        "generate_tokens_per_second": generate,
        "over_generate_at_1": 1 / steps[1] / generate[1],
        "throughput_32_over_1": 32 * steps[1] / steps[32],
    }


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, those read and those written, of a large copy."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.int8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def _step(runner: Runner, sampler: Sampler, height: int, device: torch.device) -> float:
    """Seconds of a decode step of `height` greedy requests that have _PROMPT tokens and get some more."""
    for row in range(height):
        runner.place(row, _PROMPT)

    def step() -> list[int]:
        tokens = sampler.sample(runner.decode(height, _PROMPT + _NEW), 0)
        runner.feed(0, tokens)
        return tokens.tolist()

    return _seconds(step, device)


def _prefill(runner: Runner, device: torch.device) -> float:
    tokens = torch.randint(3, 1000, (_CHUNK,), device=device)

    def read() -> None:
        for start in range(0, _PROMPT, _CHUNK):
            runner.prefill(0, tokens, start)

    return _PROMPT / _seconds(read, device)


def _generate(model: LlamaForCausalLM, height: int, device: torch.device) -> float:
    """Tokens per second of transformers' own decoding: the difference of two lengths, so without prefill."""
    prompts = torch.randint(3, 1000, (height, _PROMPT), device=device)

    def seconds(new_tokens: int) -> float:
        options = GenerationConfig(
            do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0
        )
        started = time.perf_counter()
        model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=options)
        _wait(device)
        return time.perf_counter() - started

    with torch.inference_mode():
        seconds(2)
        return height * 16 / max(seconds(18) - seconds(2), 1e-9)


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median of one call, waited for; a device's own launch and wait are part of a step."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
