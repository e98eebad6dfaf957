"""Compare the tokens of a small model: on a device and on the CPU, and with and without CUDA graphs.

Knows the engine, its batch and requests; knows nothing about kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.gpu.random_model import SMALL, placement_of, random_model
from benchmarks.gpu.results import CheckFailed, Measurements, Skipped
from llama.model.placement import Placement
from llama.model.quantized_layers import Quantization
from llama.sampling_params import SamplingParams
from llama.torch_engine.batch import Batch
from llama.torch_engine.engine import TorchEngine
from llama.torch_engine.kv_cache import CacheShape, KVCache
from llama.torch_engine.layers import take_apart

_SHAPE = CacheShape(8, 512)
_NEW_TOKENS = 40
# The number of requests that are cancelled, by the step before which they are. So 8, 4 and then 2 requests
# run, and there is a graph for each of these batch sizes. For any other number, the graph has more rows than
# the step without graphs. Libraries may then choose another kernel, which rounds differently.
_CANCELLED = {10: 4, 20: 2}


def check_engines(measurements: Measurements, device: torch.device) -> None:
    """Run all checks."""
    measurements.take("tokens in float32", partial(_check_tokens, device))
    cases: tuple[tuple[str, str, Quantization], ...] = (
        ("bfloat16", "bfloat16", "none"),
        ("float16", "float16", "none"),
        ("fp8", "bfloat16", "fp8"),
        ("nf4", "bfloat16", "nf4"),
        ("int8", "bfloat16", "int8"),
    )
    for name, dtype, quantization in cases:
        measurements.take(f"engine in {name}", partial(_check_graphs, device, dtype, quantization))


def _check_tokens(device: torch.device) -> dict[str, Any]:
    """Compare tokens between the CPU and the device, in float32. On a GPU, steps are replayed from graphs.

    12 requests of different lengths run on a real engine. Every other one is sampled. Raises CheckFailed.
    """
    answers = []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model = LlamaForCausalLM(SMALL).float().eval().requires_grad_(False).to(place)
        placement = placement_of(SMALL, place, "none", "float32", _SHAPE.length)
        answers.append(_answers(model, placement))
    return compare_tokens("the CPU", "the device", *answers)


def _check_graphs(device: torch.device, dtype: str, quantization: Quantization) -> dict[str, Any]:
    """Compare tokens with and without CUDA graphs, on the same device, in 16 bits.

    Two waves of requests run, with cancelled requests in the first one. The prompts of the second wave begin
    like those of the first one, so that prefixes are reused. Raises CheckFailed, or GenerationFailed if a
    number is not finite.
    """
    placement = placement_of(SMALL, device, quantization, dtype, _SHAPE.length)
    if device.type == "cuda" and not placement.flash_attention:
        raise Skipped(
            "without flash attention, a graph may read more positions than the step, and round differently"
        )
    with_graphs, copied = _run_waves(placement, graphs=device.type == "cuda")
    without, _ = _run_waves(placement, graphs=False)
    if not copied:
        raise CheckFailed("no prefix was reused")
    tokens = compare_tokens("steps without graphs", "steps with graphs", without, with_graphs)
    return {**tokens, "positions_reused": copied}


def compare_tokens(first: str, second: str, wanted: list[list[int]], got: list[list[int]]) -> dict[str, Any]:
    """Return the numbers of requests and tokens. Raises CheckFailed if a token differs."""
    different = []
    for index, (a, b) in enumerate(zip(wanted, got, strict=True)):
        if a != b:
            at = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))
            different.append(
                f"request {index} differs from token {at} on: {b[at:]} with {second}, {a[at:]} with {first}"
            )
    if different:
        raise CheckFailed("\n".join(different))
    return {"requests": len(got), "tokens": sum(map(len, got))}


def _answers(model: LlamaForCausalLM, placement: Placement) -> list[list[int]]:
    def load() -> Batch:
        batch = _batch(model, placement, KVCache.for_placement(SMALL, _SHAPE, placement))
        if placement.device.type == "cuda":
            batch.prepare_gpu(graphs=True)
        return batch

    engine = TorchEngine(load)
    try:
        streams = []
        for index in range(12):
            sampled = {"temperature": 0.8, "top_p": 0.9, "seed": index} if index % 2 else {"temperature": 0.0}
            params = SamplingParams(max_new_tokens=_NEW_TOKENS, **sampled)
            streams.append(engine.submit(_prompt(5 + 7 * index, index), params))
        return [[token for tokens in stream for token in tokens] for stream in streams]
    finally:
        engine.close()


class _CountingCache(KVCache):
    """A cache that counts the positions that are copied from row to row."""

    copied = 0

    def copy(self, source: int, target: int, count: int) -> None:
        self.copied += count
        super().copy(source, target, count)


def _run_waves(placement: Placement, *, graphs: bool) -> tuple[list[list[int]], int]:
    """Run both waves. Return the answers, including cancelled ones, and how many positions were copied."""
    torch.manual_seed(0)
    model = random_model(SMALL, placement.quantization, placement.device, placement.dtype)
    cache = _CountingCache.for_placement(SMALL, _SHAPE, placement)
    batch = _batch(model, placement, cache)
    if graphs:
        batch.prepare_gpu(graphs=True)
    prompts = [_prompt(20 + 9 * index, index) for index in range(_SHAPE.rows)]
    answers = _run(batch, prompts, _CANCELLED)
    answers += _run(batch, [prompt + _prompt(7, 99) for prompt in prompts], {})
    return answers, cache.copied


def _run(batch: Batch, prompts: Sequence[list[int]], cancelled: dict[int, int]) -> list[list[int]]:
    """Step until all requests have ended, and return their tokens. `cancelled` is like _CANCELLED."""
    params = SamplingParams(temperature=0.0, max_new_tokens=_NEW_TOKENS)
    requests = [batch.request(prompt, params) for prompt in prompts]
    for request in requests:
        batch.add(request)
    step, running = 0, list(requests)
    while not batch.idle:
        for _ in range(cancelled.get(step, 0)):
            running.pop(0).stream.cancel()
        batch.step()
        step += 1
    for request in requests:
        for _ in request.stream:  # raises GenerationFailed if the request has failed
            pass
    return [request.tokens[request.prompt_length :] for request in requests]


def _batch(model: LlamaForCausalLM, placement: Placement, cache: KVCache) -> Batch:
    parts = take_apart(model, placement)
    return Batch(parts, cache, vocabulary=SMALL.vocab_size, eos_token_ids=[])


def _prompt(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(3, SMALL.vocab_size, (count,), generator=generator)]
