"""Measure the steps of a random 70B in one precision: decoding, prefill and memory.

Decoding is compared with the time that reading its bytes takes, and with `generate` of transformers on the
same layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.gpu_model import random_model
from llama.model.placement import Placement
from llama.model.precision_plan import bytes_of_weights, bytes_per_token
from llama.model.quantized_layers import Quantization
from llama.sampling_params import SamplingParams
from llama.serving.schema import input_defaults
from llama.torch_engine.attention import Chunk
from llama.torch_engine.kv_cache import CacheShape, KVCache
from llama.torch_engine.layers import ModelParts, take_apart
from llama.torch_engine.rows import Rows
from llama.torch_engine.runner import Runner
from llama.torch_engine.sampler import Sampler
from predict import Predictor

_HEIGHTS = (1, 4, 8, 16, 32)
_PROMPT, _NEW = 512, 64
_CONTEXT = _PROMPT + 2 * _NEW
_ROWS = 32
_CHUNK = 256
_GREEDY = SamplingParams(temperature=0.0)


def measure(config: LlamaConfig, quantization: Quantization, device: torch.device) -> dict[str, Any]:
    """Return all figures of one precision, in seconds, bytes and tokens per second."""
    started = time.perf_counter()
    bandwidth = copy_bandwidth(device)
    model = random_model(config, quantization, device)
    built = time.perf_counter() - started
    # The state dict includes the scales of NF4 and int8, which are neither parameters nor buffers.
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    embedding = model.get_input_embeddings().weight.nbytes
    generate = {height: _generate(model, height, device) for height in (1, 32)}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # so that the peak of `generate` does not count
    placement = Placement(device, model.dtype, quantization, _CONTEXT)
    steps, sampled, prefill = _measure_steps(config, take_apart(model, placement), placement)
    per_token = bytes_per_token(config, placement.cache_dtype)
    # The embedding is subtracted, because each request reads only one of its rows.
    floors = {height: (weights - embedding + height * _PROMPT * per_token) / bandwidth for height in _HEIGHTS}
    return {
        "seconds_to_build": built,
        "copy_bandwidth": bandwidth,
        "bytes_of_weights": weights,
        "bytes_of_weights_planned": bytes_of_weights(config, quantization),
        "bytes_of_cache": _ROWS * _CONTEXT * per_token,
        "bytes_used_at_most": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "decode": {
            height: {
                "seconds": steps[height],
                "seconds_sampled": sampled[height],
                "floor": floors[height],
                "floor_over_measured": floors[height] / steps[height],
                "tokens_per_second": height / steps[height],
            }
            for height in _HEIGHTS
        },
        "prefill_tokens_per_second": prefill,
        "generate_tokens_per_second": generate,
        "over_generate_at_1": 1 / steps[1] / generate[1] if generate[1] else None,
        "throughput_32_over_1": 32 * steps[1] / steps[32],
    }


def _measure_steps(
    config: LlamaConfig, parts: ModelParts, placement: Placement
) -> tuple[dict[int, float], dict[int, float], float]:
    """Return the seconds per decode step by batch size, first greedy and then sampled, and the prefill speed.

    The prefill speed is in tokens per second.
    """
    device = placement.device
    published = SamplingParams.from_inputs(input_defaults(Predictor.run)).with_seed()
    with torch.inference_mode():
        rows = Rows(KVCache(config, CacheShape(_ROWS, _CONTEXT), placement.cache_dtype, device))
        runner = Runner(parts, rows)
        if device.type == "cuda":
            runner.capture()
        sampler = Sampler(rows, config.vocab_size, [])
        steps = {height: _step(runner, sampler, height, _GREEDY, device) for height in _HEIGHTS}
        sampled = {height: _step(runner, sampler, height, published, device) for height in _HEIGHTS}
        return steps, sampled, _prefill(runner, device)


def copy_bandwidth(device: torch.device) -> float:
    """Return the bandwidth of a large copy, in bytes per second. Read and written bytes both count."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.int8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def _step(
    runner: Runner, sampler: Sampler, height: int, params: SamplingParams, device: torch.device
) -> float:
    """Return the seconds per decode step of `height` requests, each with a prompt of _PROMPT tokens."""
    prompt = torch.randint(3, 1000, (_PROMPT,), device=device)
    for row in range(height):
        sampler.add(row, prompt, params)
        runner.start_decoding(row, _PROMPT)

    def step() -> list[int]:
        tokens = sampler.sample(runner.decode(height, _PROMPT + _NEW), 0, [params] * height)
        runner.feed(0, tokens)
        return tokens.tolist()

    return _seconds(step, device)


def _prefill(runner: Runner, device: torch.device) -> float:
    tokens = torch.randint(3, 1000, (_CHUNK,), device=device)

    def read() -> None:
        for start in range(0, _PROMPT, _CHUNK):
            runner.prefill([Chunk(0, start, tokens)])

    return _PROMPT / _seconds(read, device)


def _generate(model: LlamaForCausalLM, height: int, device: torch.device) -> float | None:
    """Return the tokens per second of `generate` of transformers, or None if it runs out of memory.

    Prefill does not count: the speed is calculated from the difference of two runs with different lengths.
    """
    prompts = torch.randint(3, 1000, (height, _PROMPT), device=device)

    def seconds(new_tokens: int) -> float:
        options = GenerationConfig(
            do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0
        )
        started = time.perf_counter()
        model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=options)
        _wait(device)
        return time.perf_counter() - started

    try:
        with torch.inference_mode():
            seconds(2)
            return height * 16 / max(seconds(18) - seconds(2), 1e-9)
    except torch.OutOfMemoryError:
        return None


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Return the median seconds of a call, including launching its kernels and waiting for the device."""
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
