"""Steps of the engine with random weights and a random cache, and how long they take.

`Stepper` puts a step together as `Batch` does, without an engine. The functions measure decoding, mixed
lengths, sampling and prompts. They return seconds, tokens per second and numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.gpu.device import launches, seconds_per_call
from benchmarks.gpu.results import Skipped
from llama.model.placement import Placement
from llama.sampling_params import SamplingParams
from llama.torch_engine.attention import Chunk
from llama.torch_engine.kv_cache import CacheShape, KVCache
from llama.torch_engine.layers import ModelParts
from llama.torch_engine.prompt_share import MOST_PROMPT_TOKENS
from llama.torch_engine.rows import Rows
from llama.torch_engine.runner import Runner
from llama.torch_engine.sampler import Sampler

_Result = TypeVar("_Result")

GREEDY = SamplingParams(temperature=0.0)
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


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many requests and tokens the measurements use."""

    rows: int = 32
    """The most requests at once."""
    context: int = 4096
    batch_sizes: tuple[int, ...] = (1, 4, 8, 16, 32)
    """The numbers of requests whose decode steps are measured."""
    prompt: int = 512
    """Tokens in the row of each of these requests."""
    room: int = 128
    """Tokens that each of these rows has room for after the prompt."""
    chunks: tuple[int, ...] = (256, 512, 1024, 2048)
    """The numbers of prompt tokens per step that are compared."""
    long: int = 4000
    """Tokens of the long request in a batch of mixed lengths, and of a long prompt."""
    short: int = 200
    """Tokens of each other request in that batch."""
    repeats: int = 20

    @property
    def most_requests(self) -> CacheShape:
        """The cache for the most requests at once, with short rows."""
        return CacheShape(self.rows, self.prompt + self.room)


FULL_SIZES = Sizes()
SMALL_SIZES = Sizes(
    rows=4,
    context=256,
    batch_sizes=(1, 4),
    prompt=48,
    room=16,
    chunks=(32, 64),
    long=200,
    short=20,
    repeats=2,
)


class Stepper:
    """Requests that decode together. `step` is a step of the engine, with sampling and a wait for tokens."""

    def __init__(
        self, parts: ModelParts, config: LlamaConfig, placement: Placement, shape: CacheShape
    ) -> None:
        """The cache is filled with random numbers, because kernels can be faster on zeros."""
        self.config, self.placement, self.device, self.shape = config, placement, placement.device, shape
        cache = KVCache.for_placement(config, shape, placement)
        for layer in cache.layers:
            layer.normal_()
        rows = Rows(cache)
        self.runner = Runner(parts, rows)
        self._sampler = Sampler(rows, config.vocab_size, [config.eos_token_id])
        self._longest, self._params = 0, list[SamplingParams]()

    def start(self, lengths: Sequence[int], params: SamplingParams = GREEDY) -> None:
        """Start to decode a request for each length, the number of tokens that its row already has."""
        room = max(self.shape.length - max(lengths), 1)
        params = params.model_copy(update={"max_new_tokens": room})
        self._longest, self._params = max(lengths), [params] * len(lengths)
        for row, length in enumerate(lengths):
            self._sampler.add(row, self._token_ids(length), params)
            self.runner.start_decoding(row, length)

    def step(self) -> list[int]:
        """Decode a token for each request, and return the tokens."""
        self._longest = min(self._longest + 1, self.shape.length)
        tokens = self._sampler.sample(self.decode(), 0, self._params)
        self.runner.feed(0, tokens)
        return tokens.tolist()

    def decode(self) -> Tensor:
        """Return the logits of the next tokens, without sampling, and without waiting for the device."""
        return self.runner.decode(len(self._params), self._longest)

    def prefill(self, tokens: int, chunk: int) -> None:
        """Read a prompt into row 0, in chunks."""
        token_ids = self._token_ids(tokens)
        for start in range(0, tokens, chunk):
            self.runner.prefill([Chunk(0, start, token_ids[start : start + chunk])])

    def _token_ids(self, count: int) -> Tensor:
        return torch.randint(3, self.config.vocab_size, (count,), device=self.device)


def run_largest_steps(stepper: Stepper, sizes: Sizes) -> None:
    """Run the steps that need the most memory: the longest prompt chunk, and sampling by all rules."""
    stepper.prefill(stepper.shape.length, min(MOST_PROMPT_TOKENS["cuda"], stepper.shape.length))
    stepper.start([sizes.short] * stepper.shape.rows, ALL_RULES)
    stepper.step()


def decode_steps(stepper: Stepper, sizes: Sizes) -> dict[str, Any]:
    """Return the speed of greedy decode steps, by number of requests with equally long prompts."""
    result = {}
    for batch_size in sizes.batch_sizes:
        if batch_size <= stepper.shape.rows:
            stepper.start([sizes.prompt] * batch_size)
            seconds = seconds_per_call(stepper.step, stepper.device, sizes.repeats)
            result[str(batch_size)] = {
                "prompt_tokens": sizes.prompt,
                "seconds": seconds,
                "tokens_per_second": batch_size / seconds,
            }
    return result


def mixed_lengths(stepper: Stepper, sizes: Sizes) -> dict[str, Any]:
    """Return the seconds of a step of one long and many short requests, and of as many equally long ones
    with the same number of tokens in total."""
    rows, length = stepper.shape.rows, stepper.shape.length
    if rows < 2 or length <= sizes.long + sizes.repeats:
        raise Skipped(f"the cache has room for {rows} requests of {length} tokens")
    mixed = [sizes.long, *[sizes.short] * (rows - 1)]
    result: dict[str, Any] = {"requests": rows, "long": sizes.long, "short": sizes.short}
    for name, lengths in (("mixed", mixed), ("equal", [sum(mixed) // rows] * rows)):
        stepper.start(lengths)
        result[f"seconds_{name}"] = seconds_per_call(stepper.step, stepper.device, sizes.repeats)
    return result


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
    return _by_batch_size(stepper, sizes, partial(_decode_seconds, stepper, sizes))


def launches_of_step(stepper: Stepper, sizes: Sizes) -> dict[str, Any]:
    """Return the kernel launches of a step without graphs, by number of requests."""
    return _by_batch_size(stepper, sizes, partial(launches, stepper.decode, stepper.device))


def _by_batch_size(stepper: Stepper, sizes: Sizes, measure: Callable[[], _Result]) -> dict[str, _Result]:
    """Measure a single short request, and as many short requests as the cache has rows."""
    result = {}
    for batch_size in sorted({1, stepper.shape.rows}):
        stepper.start([sizes.short] * batch_size)
        result[str(batch_size)] = measure()
    return result


def _decode_seconds(stepper: Stepper, sizes: Sizes) -> float:
    with torch.inference_mode():
        return seconds_per_call(stepper.decode, stepper.device, sizes.repeats)
