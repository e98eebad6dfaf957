"""Measure a random Llama 2 70B in one precision: speed, prompts, sampling, graphs and memory.

Several caches are measured one after the other: the one that a server would have on this GPU, one for the
most requests with short rows, and one for a single long prompt. Knows the order; `steps.py` and `memory.py`
measure.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.gpu import memory, steps
from benchmarks.gpu.device import clocks, copy_bandwidth, free_memory, release_memory, wait
from benchmarks.gpu.random_model import SMALL, placement_of, random_model
from benchmarks.gpu.results import Measurements
from benchmarks.gpu.steps import FULL_SIZES, SMALL_SIZES, Sizes, Stepper
from llama.model.placement import Placement
from llama.model.precision_plan import LLAMA_2_70B, bytes_of_weights, bytes_per_token
from llama.model.quantized_layers import Quantization
from llama.torch_engine.kv_cache import CacheShape
from llama.torch_engine.layers import ModelParts, take_apart

Take = Callable[[str, Callable[[], Any]], Any]
"""`Measurements.take`."""


def measure_precision(
    measurements: Measurements, quantization: Quantization, device: torch.device, *, small: bool
) -> None:
    """Take all measurements of a precision, or only record that the device cannot hold the weights."""
    config, sizes = (SMALL, SMALL_SIZES) if small else (LLAMA_2_70B, FULL_SIZES)
    choose = partial(placement_of, config, device, quantization, "bfloat16", sizes.context)
    if measurements.take("placement", lambda: str(choose())) is None:
        return
    placement = choose()
    measurements.take("copy_bandwidth", partial(copy_bandwidth, device))
    _release(device)
    free_at_first = free_memory(device)
    parts = _parts(measurements, config, placement, sizes)

    def served_shape() -> CacheShape:
        return memory.served_shape(config, placement, CacheShape(sizes.rows, sizes.context))

    groups: tuple[tuple[str, Callable[[], CacheShape], Callable[[Take, Stepper, Sizes], None]], ...] = (
        ("steps with the cache of a server", served_shape, partial(_measure_served, free_at_first)),
        ("steps with the most requests", lambda: sizes.most_requests, _measure_most_requests),
        ("steps with a long prompt", lambda: CacheShape(1, sizes.context), _measure_prompts),
        # The profiler takes GPU memory of its own, and may slow down what follows, so this comes last.
        ("launches of a step", lambda: sizes.most_requests, _count_launches),
    )
    for name, shape, measure in groups:
        with measurements.recording_failures(name):
            measure(measurements.take, Stepper(parts, config, placement, shape()), sizes)
        _release(device)


def _release(device: torch.device) -> None:
    """Free the graphs and the cache of the previous measurements. Only `gc` frees reference cycles."""
    gc.collect()
    release_memory(device)


def _parts(measurements: Measurements, config: LlamaConfig, placement: Placement, sizes: Sizes) -> ModelParts:
    """Make the model, measure transformers' `generate` with it, and take it apart."""
    started = time.perf_counter()
    model = random_model(config, placement.quantization, placement.device)
    wait(placement.device)
    seconds = time.perf_counter() - started
    measurements.take("weights", lambda: {"seconds_to_build": seconds, **_bytes(model, config, placement)})
    measurements.take("generate_of_transformers", partial(_generate, model, sizes))
    _release(placement.device)
    return take_apart(model, placement)


def _measure_served(free_at_first: int, take: Take, stepper: Stepper, sizes: Sizes) -> None:
    take("graphs", partial(memory.capture, stepper))
    steps.run_largest_steps(stepper, sizes)
    take("memory", partial(memory.used_memory, stepper, free_at_first))
    take("mixed_lengths", partial(steps.mixed_lengths, stepper, sizes))


def _measure_most_requests(take: Take, stepper: Stepper, sizes: Sizes) -> None:
    take("step_without_graphs", partial(steps.step_without_graphs, stepper, sizes))
    if stepper.device.type == "cuda":
        stepper.runner.capture()
    take("decode", partial(steps.decode_steps, stepper, sizes))
    take("clocks_after_decode", partial(clocks, stepper.device))
    defaults = take("published_defaults", steps.published_defaults)
    take("sampling", partial(steps.sampling, stepper, sizes, defaults))


def _measure_prompts(take: Take, stepper: Stepper, sizes: Sizes) -> None:
    take("prompts", partial(steps.prompts, stepper, sizes))


def _count_launches(take: Take, stepper: Stepper, sizes: Sizes) -> None:
    take("launches", partial(steps.launches_of_step, stepper, sizes))


def _bytes(model: LlamaForCausalLM, config: LlamaConfig, placement: Placement) -> dict[str, int]:
    return {
        # The state dict includes the scales of NF4 and int8, which are neither parameters nor buffers.
        "bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
        "bytes_calculated": bytes_of_weights(config, placement.quantization),
        # A step reads only one of the embedding's rows per request.
        "bytes_of_embedding": model.get_input_embeddings().weight.nbytes,
        "bytes_per_cached_token": bytes_per_token(config, placement.cache_dtype),
    }


def _generate(model: LlamaForCausalLM, sizes: Sizes) -> dict[str, float | None]:
    """Return the tokens per second of `generate` of transformers, by number of requests.

    Prefill does not count: the speed is calculated from the difference of two runs with different lengths. A
    speed is None if the GPU ran out of memory.
    """
    return {
        str(batch_size): _generate_speed(model, batch_size, sizes.prompt) for batch_size in (1, sizes.rows)
    }


def _generate_speed(model: LlamaForCausalLM, batch_size: int, length: int) -> float | None:
    prompt = torch.randint(3, model.config.vocab_size, (batch_size, length), device=model.device)

    def seconds(new_tokens: int) -> float:
        options = GenerationConfig(
            do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0
        )
        started = time.perf_counter()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=options)
        wait(model.device)
        return time.perf_counter() - started

    try:
        with torch.inference_mode():
            seconds(2)
            return batch_size * 16 / max(seconds(18) - seconds(2), 1e-9)
    except torch.OutOfMemoryError:
        return None
