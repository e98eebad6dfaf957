"""The engine's runner and sampler with random weights and a random cache, stepped without an engine.

Knows how a step is put together, as `Batch` does it; knows nothing about what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.gpu.measurements import Skipped
from llama.errors import DoesNotFit
from llama.model.placement import Placement, place
from llama.model.quantized_layers import Quantization
from llama.sampling_params import SamplingParams
from llama.settings import Settings
from llama.torch_engine.attention import Chunk
from llama.torch_engine.kv_cache import CacheShape, KVCache
from llama.torch_engine.layers import ModelParts
from llama.torch_engine.rows import Rows
from llama.torch_engine.runner import Runner
from llama.torch_engine.sampler import Sampler

GREEDY = SamplingParams(temperature=0.0)


def placement_of(
    config: LlamaConfig, device: torch.device, quantization: Quantization, dtype: str, context: int
) -> Placement:
    """Return the placement that the engine would choose. Raises Skipped if the device cannot hold the model
    or cannot compute in this precision."""
    settings = Settings.model_validate(
        {"device": str(device), "quantization": quantization, "dtype": dtype, "max_context": context}
    )
    try:
        return place(settings, config)
    except DoesNotFit as error:
        raise Skipped(error.message) from error


def make_cache(config: LlamaConfig, shape: CacheShape, placement: Placement) -> KVCache:
    """Create a cache in the layout that the placement's attention needs."""
    return KVCache(
        config, shape, placement.cache_dtype, placement.device, by_position=placement.flash_attention
    )


class Stepper:
    """Requests that decode together. `step` is one step of the engine, with sampling and the host's wait."""

    def __init__(
        self, parts: ModelParts, config: LlamaConfig, shape: CacheShape, placement: Placement
    ) -> None:
        """The cache is filled with random numbers, because kernels can be faster on zeros."""
        self.shape, self.device = shape, placement.device
        cache = make_cache(config, shape, placement)
        for layer in cache.layers:
            layer.normal_()
        self._vocabulary, rows = config.vocab_size, Rows(cache)
        self.runner = Runner(parts, rows)
        self._sampler = Sampler(rows, config.vocab_size, [config.eos_token_id])
        self._longest, self._params = 0, list[SamplingParams]()

    def start(self, lengths: Sequence[int], params: SamplingParams = GREEDY) -> None:
        """Let one request decode for each length, the number of tokens that its row has already."""
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
        return torch.randint(3, self._vocabulary, (count,), device=self.device)
