"""Measure a random Llama 2 70B in one precision: speed, prompts, sampling, graphs and memory.

Several caches are measured one after the other: the one that a server would have on this GPU, one for the
most requests with short rows, and one for a single long prompt. Knows the order; `steps.py`, `memory.py` and
`launches.py` measure.
"""

from __future__ import annotations

import gc
import time
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.gpu import sizes as all_sizes
from benchmarks.gpu.device import clocks, copy_bandwidth, free_memory, release_memory, wait
from benchmarks.gpu.launches import launches
from benchmarks.gpu.measurements import Measurements
from benchmarks.gpu.memory import capture, run_largest_steps, served_shape, used_memory
from benchmarks.gpu.random_model import SMALL, random_model
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.stepper import Stepper, placement_of
from benchmarks.gpu.steps import (
    decode_steps,
    mixed_lengths,
    prompts,
    published_defaults,
    sampling,
    step_without_graphs,
)
from llama.model.placement import Placement
from llama.model.precision_plan import LLAMA_2_70B, bytes_of_weights, bytes_per_token
from llama.model.quantized_layers import Quantization
from llama.torch_engine.kv_cache import CacheShape
from llama.torch_engine.layers import ModelParts, take_apart


def measure_precision(
    measurements: Measurements, quantization: Quantization, device: torch.device, small: bool
) -> None:
    """Take all measurements of a precision."""
    config, sizes = (SMALL, all_sizes.SMALL) if small else (LLAMA_2_70B, all_sizes.FULL)
    placements = list[Placement]()

    def fits() -> str:
        placements.append(placement_of(config, device, quantization, "bfloat16", sizes.context))
        return str(placements[0])

    if measurements.take("placement", fits) is None:
        return
    (placement,) = placements
    measurements.take("copy_bandwidth", partial(copy_bandwidth, device))
    release_memory(device)
    free = free_memory(device)
    _Part(measurements, config, placement, sizes, free).measure()


class _Part:
    """The measurements that need a model. The caches are freed between them."""

    def __init__(
        self, measurements: Measurements, config: LlamaConfig, placement: Placement, sizes: Sizes, free: int
    ) -> None:
        """`free` are the free bytes before the model is made."""
        self._measurements, self._sizes, self._free = measurements, sizes, free
        self._config, self._placement, self._device = config, placement, placement.device

    def measure(self) -> None:
        parts = self._parts()
        for name, measure in (
            ("steps with the cache of a server", self._measure_served),
            ("steps with the most requests", self._measure_most_requests),
            ("steps with a long prompt", self._measure_prompts),
            ("launches of a step", self._count_launches),
        ):
            with self._measurements.recording_failures(name):
                measure(parts)
            self._release()

    def _parts(self) -> ModelParts:
        """Make the model, measure transformers' `generate` with it, and take it apart."""
        take, started = self._measurements.take, time.perf_counter()
        model = random_model(self._config, self._placement.quantization, self._device)
        wait(self._device)
        seconds = time.perf_counter() - started
        take("weights", lambda: {"seconds_to_build": seconds, **_bytes(model, self._config, self._placement)})
        take("generate_of_transformers", partial(_generate, model, self._sizes))
        self._release()
        return take_apart(model, self._placement)

    def _measure_served(self, parts: ModelParts) -> None:
        take, config, placement, sizes = self._measurements.take, self._config, self._placement, self._sizes
        shape = served_shape(config, placement, sizes)
        stepper = Stepper(parts, config, shape, placement)
        take("graphs", partial(capture, stepper, config, placement))
        run_largest_steps(stepper, sizes)
        take("memory", partial(used_memory, config, placement, shape, self._free))
        take("mixed_lengths", partial(mixed_lengths, stepper, sizes))

    def _measure_most_requests(self, parts: ModelParts) -> None:
        take, sizes = self._measurements.take, self._sizes
        stepper = self._stepper_of_most_requests(parts)
        take("step_without_graphs", partial(step_without_graphs, stepper, sizes))
        if self._device.type == "cuda":
            stepper.runner.capture()
        take("decode", partial(decode_steps, stepper, sizes))
        take("clocks_after_decode", partial(clocks, self._device))
        defaults = take("published_defaults", published_defaults)
        take("sampling", partial(sampling, stepper, sizes, defaults))

    def _measure_prompts(self, parts: ModelParts) -> None:
        shape = CacheShape(1, self._sizes.context)
        stepper = Stepper(parts, self._config, shape, self._placement)
        self._measurements.take("prompts", partial(prompts, stepper, self._sizes))

    def _count_launches(self, parts: ModelParts) -> None:
        """The profiler takes GPU memory of its own, and may slow down what follows, so this comes last."""
        stepper = self._stepper_of_most_requests(parts)
        self._measurements.take("launches", partial(_launches, stepper, self._sizes))

    def _stepper_of_most_requests(self, parts: ModelParts) -> Stepper:
        shape = CacheShape(self._sizes.rows, self._sizes.prompt + self._sizes.room)
        return Stepper(parts, self._config, shape, self._placement)

    def _release(self) -> None:
        """Free the graphs and the cache of the measurements before. The graphs are in reference cycles."""
        gc.collect()
        release_memory(self._device)


def _launches(stepper: Stepper, sizes: Sizes) -> dict[str, Any]:
    """Return the launches of a decode step without graphs, by number of requests."""
    result = {}
    for height in sorted({1, stepper.shape.rows}):
        stepper.start([sizes.short] * height)
        result[str(height)] = launches(stepper.decode, stepper.device)
    return result


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

    Prefill does not count: the speed is calculated from the difference of two runs with different lengths. It
    is None if the GPU runs out of memory.
    """
    return {str(height): _generate_speed(model, height, sizes.prompt) for height in (1, sizes.rows)}


def _generate_speed(model: LlamaForCausalLM, height: int, length: int) -> float | None:
    prompt = torch.randint(3, model.config.vocab_size, (height, length), device=model.device)

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
            return height * 16 / max(seconds(18) - seconds(2), 1e-9)
    except torch.OutOfMemoryError:
        return None
