"""Measure the seconds of steps: decoding, mixed lengths, sampling, and prompts.

All return seconds, tokens per second and numbers of tokens, as JSON can represent them. Knows what is
compared with what; `stepper.py` knows how a step works.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.gpu.device import seconds_per_call
from benchmarks.gpu.measurements import Skipped
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.stepper import GREEDY, Stepper
from llama.sampling_params import SamplingParams

ALL_RULES = SamplingParams(
    temperature=0.7,
    top_p=0.9,
    top_k=50,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    min_new_tokens=1,
    seed=1,
)


def decode_steps(stepper: Stepper, sizes: Sizes) -> dict[str, Any]:
    """Return the speed of greedy decode steps, by number of requests with equally long prompts."""
    result = {}
    for height in sizes.heights:
        if height <= stepper.shape.rows:
            stepper.start([sizes.prompt] * height)
            seconds = seconds_per_call(stepper.step, stepper.device, sizes.repeats)
            result[str(height)] = {
                "prompt_tokens": sizes.prompt,
                "seconds": seconds,
                "tokens_per_second": height / seconds,
            }
    return result


def mixed_lengths(stepper: Stepper, sizes: Sizes) -> dict[str, Any]:
    """Compare a step of one long and many short requests with one of as many tokens in equal requests."""
    rows, length = stepper.shape.rows, stepper.shape.length
    if rows < 2 or length <= sizes.long + sizes.repeats:
        raise Skipped(f"the cache has room for {rows} requests of {length} tokens")
    mixed = [sizes.long, *[sizes.short] * (rows - 1)]
    result: dict[str, Any] = {"requests": rows, "long": sizes.long, "short": sizes.short}
    for name, lengths in (("mixed", mixed), ("equal", [sum(mixed) // rows] * rows)):
        stepper.start(lengths)
        result[f"seconds_{name}"] = seconds_per_call(stepper.step, stepper.device, sizes.repeats)
    return {**result, "mixed_over_equal": result["seconds_mixed"] / result["seconds_equal"]}


def sampling(stepper: Stepper, sizes: Sizes, defaults: dict[str, Any] | None) -> dict[str, Any]:
    """Return the seconds of a step with all rows, without sampling and by sampling parameters.

    `defaults` are those of `published_defaults`, or None if they are unknown.
    """
    rows = stepper.shape.rows
    stepper.start([sizes.prompt] * rows)
    result = {"requests": rows, "without_sampling": _decode_seconds(stepper, sizes)}
    rules = {"greedy": GREEDY, "all_rules": ALL_RULES}
    if defaults is not None:
        rules["published_defaults"] = SamplingParams(**defaults)
    for name, params in rules.items():
        stepper.start([sizes.prompt] * rows, params)
        result[name] = seconds_per_call(stepper.step, stepper.device, sizes.repeats)
    return result


def published_defaults() -> dict[str, Any]:
    """Return the sampling parameters of a request that sets nothing. Raises Skipped without Cog."""
    try:
        from llama.serving.schema import input_defaults
        from predict import Predictor
    except ImportError as error:
        raise Skipped(f"predict.py cannot be imported ({error})") from error
    params = SamplingParams.from_inputs(input_defaults(Predictor.run)).with_seed()
    return params.model_dump(exclude_none=True)


def prompts(stepper: Stepper, sizes: Sizes) -> dict[str, Any]:
    """Return the seconds for a long prompt and its speed, by the number of prompt tokens per step."""
    result = {}
    repeats = max(sizes.repeats // 6, 1)  # each takes seconds
    for chunk in sizes.chunks:
        read = partial(stepper.prefill, sizes.long, chunk)
        seconds = seconds_per_call(read, stepper.device, repeats)
        result[str(chunk)] = {
            "prompt_tokens": sizes.long,
            "seconds": seconds,
            "seconds_per_step": seconds / -(-sizes.long // chunk),
            "tokens_per_second": sizes.long / seconds,
        }
    return result


def step_without_graphs(stepper: Stepper, sizes: Sizes) -> dict[str, float]:
    """Return the seconds of a step whose kernels are launched one by one. Call it before the capture."""
    result = {}
    for height in sorted({1, stepper.shape.rows}):
        stepper.start([sizes.short] * height)
        result[str(height)] = _decode_seconds(stepper, sizes)
    return result


def _decode_seconds(stepper: Stepper, sizes: Sizes) -> float:
    with torch.inference_mode():
        return seconds_per_call(stepper.decode, stepper.device, sizes.repeats)
