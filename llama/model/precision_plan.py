"""Which precision fits which GPUs: computed, without loading anything.

Knows arithmetic on a model's configuration; knows nothing of files or of how a layer computes.

Bytes of weights, for the 70B (80 layers of 855,638,016 weights in linear layers; 524,288,000 and 1,318,912
in embeddings and norms, which are not quantized), with 16 bits for what is not quantized:
    none    2 a weight                              136.90 + 1.05 = 137.95 GB
    fp8     1 a weight, 4 an output                  68.48 + 1.05 =  69.53 GB
    int8    the same                                 68.48 + 1.05 =  69.53 GB
    nf4     1/2 a weight, 4 for 64 weights           38.50 + 1.05 =  39.55 GB
Bytes of cache a token: 2 x 80 layers x 8 KV heads x 128 x 2 = 327,680; 1.34 GB for 4,096 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import LlamaConfig

from llama.errors import BadConfig, BadSettings, DoesNotFit
from llama.model.quantized_layers import Quantization, bytes_of_weight
from llama.settings import EngineName

ENOUGH_REQUESTS = 8
"""At full context: what a precision must leave room for, for `auto` to take it over a narrower one."""

RESERVE: dict[EngineName, int] = {"torch": 3 * 2**30, "vllm": 2 * 2**30}
"""Bytes of a GPU that neither weights nor cache may have, by engine: activations, graphs, workspaces.
Guesses until `make bench-gpu` has run; vLLM leaves a tenth of each card free besides."""

LLAMA_2_70B = LlamaConfig(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
    dtype="bfloat16",
)
"""What the 70B's own config.json says, to plan for before there are weights."""

_ORDER: tuple[Quantization, ...] = ("none", "fp8", "int8", "nf4")
_CAPABILITY: dict[Quantization, tuple[int, int]] = {
    "none": (7, 0),
    "fp8": (8, 9),
    "int8": (7, 5),
    "nf4": (7, 5),
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card."""

    name: str
    free: int
    """Bytes."""
    capability: tuple[int, int]
    """CUDA's compute capability."""


@dataclass(frozen=True, slots=True)
class PrecisionOption:
    """One row of the table."""

    quantization: Quantization
    weights: int
    """Bytes, over all GPUs."""
    cache: int
    """Bytes left for keys and values, over all GPUs."""
    requests: int
    """How many of full context the cache holds at once; the server may be set to take fewer."""
    refusal: str
    """Why these GPUs cannot; "" when they can."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What fits, and what LLAMA_QUANTIZATION=auto takes; None if nothing fits."""

    choices: tuple[PrecisionOption, ...]
    chosen: PrecisionOption | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Works out what fits a set of GPUs together, for requests of `context` tokens on `engine`."""

    config: LlamaConfig
    gpus: tuple[Gpu, ...]
    """Empty: the CPU, on which everything is taken to fit. `plan` needs at least one."""
    context: int
    engine: EngineName
    dtype: torch.dtype = torch.bfloat16
    """Of everything that is not quantized, the cache included."""
    stored: Quantization | None = "none"
    """What the checkpoint's linear layers are stored in, and so stay in. None: in a way that only vLLM
    reads."""

    def plan(self) -> Plan:
        """All precisions. The chosen one is the first of 16 bits, FP8, int8 and NF4 that leaves room for
        ENOUGH_REQUESTS; otherwise the one with the most room, if it has room for one. Raises BadConfig."""
        stored = self._readable()
        choices = tuple(map(self._choice, _ORDER if stored == "none" else (stored,)))
        fitting = [choice for choice in choices if not choice.refusal]
        enough = [choice for choice in fitting if choice.requests >= ENOUGH_REQUESTS]
        chosen = enough[0] if enough else max(fitting, key=lambda choice: choice.requests, default=None)
        return Plan(choices, chosen)

    def pick(self, requested: Quantization | Literal["auto"]) -> Quantization:
        """What to serve in. Raises BadConfig, BadSettings, or DoesNotFit, saying what would fit."""
        stored = self._readable()
        if stored != "none" and requested not in ("auto", stored):
            raise BadSettings(
                f"LLAMA_QUANTIZATION is {requested} and the checkpoint is stored in {stored}; unset it"
            )
        if not self.gpus:
            return stored if requested == "auto" else requested
        found = self.plan()
        cards = " and ".join(sorted({gpu.name for gpu in self.gpus}))
        if requested == "auto":
            if found.chosen is None:
                listed = ", ".join(f"{c.quantization} {c.refusal}" for c in found.choices)
                raise DoesNotFit(f"nothing fits: {listed} on {cards}; {self._advice()}")
            return found.chosen.quantization
        (choice,) = (choice for choice in found.choices if choice.quantization == requested)
        if choice.refusal:
            fitting = [c.quantization for c in found.choices if not c.refusal]
            advice = f"set LLAMA_QUANTIZATION to {' or '.join(fitting)}" if fitting else self._advice()
            raise DoesNotFit(f"{requested} on {cards}: {choice.refusal}; {advice}")
        return requested

    def _readable(self) -> Quantization:
        if self.stored is None:
            raise BadConfig(
                "config.json says that the weights are quantized in a way that only vLLM may read (AWQ, GPTQ "
                "and others; `plan` cannot tell what they take); set LLAMA_ENGINE to vllm, or use plain "
                "weights, bitsandbytes' int8 or NF4, or FP8 by rows (fbgemm_fp8)"
            )
        return self.stored

    def _choice(self, quantization: Quantization) -> PrecisionOption:
        weights = bytes_of_weights(self.config, quantization, self.dtype)
        cache = max(self._room - weights, 0)
        requests = cache // self._bytes_per_request
        refusals = self._refusals(quantization, weights, requests)
        return PrecisionOption(quantization, weights, cache, requests, " and ".join(refusals))

    @property
    def _room(self) -> int:
        """Bytes for weights and cache. Layers are divided evenly: the smallest card bounds them all."""
        return len(self.gpus) * max(min(gpu.free for gpu in self.gpus) - RESERVE[self.engine], 0)

    @property
    def _bytes_per_request(self) -> int:
        return self.context * bytes_per_token(self.config, self.dtype)

    def _refusals(self, quantization: Quantization, weights: int, requests: int) -> Iterator[str]:
        if weights > self._room:
            yield f"needs {weights / 1e9:.1f} GB for weights and has {self._room / 1e9:.1f}"
        elif requests < 1:
            yield (
                f"has no room for one request of {self.context} tokens beside {weights / 1e9:.1f} GB "
                "of weights"
            )
        oldest = min(gpu.capability for gpu in self.gpus)
        if oldest < _CAPABILITY[quantization]:
            needed = ".".join(map(str, _CAPABILITY[quantization]))
            yield f"needs compute capability {needed} and has {oldest[0]}.{oldest[1]}"
        if quantization in ("int8", "nf4") and self.engine == "vllm":
            yield "is not for vLLM, which has no bitsandbytes any more"

    def _advice(self) -> str:
        stored = self._readable()
        narrowest = stored if stored != "none" else "nf4"
        weights = bytes_of_weights(self.config, narrowest, self.dtype)
        needed = weights + self._bytes_per_request + RESERVE["torch"]
        return (
            f"take a GPU with {needed / 1e9:.0f} GB free ({narrowest}, one request of {self.context} "
            "tokens), set a smaller LLAMA_MAX_CONTEXT, or use several GPUs"
        )


def parallel_sizes(
    config: LlamaConfig, gpus: int, *, tensor: int | None, pipeline: int | None
) -> tuple[int, int]:
    """Pipeline stages and GPUs in each, for vLLM. None: all of a machine's `gpus`, tensor parallelism first,
    as long as the heads divide evenly. Raises BadSettings."""
    heads, kv_heads, mlp = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size

    def divides(size: int) -> bool:
        return heads % size == mlp % size == 0 and 0 in (kv_heads % size, size % kv_heads)

    if tensor is None:
        left = max(gpus // (pipeline or 1), 1)
        tensor = max(size for size in range(1, left + 1) if left % size == 0 and divides(size))
    elif not divides(tensor):
        raise BadSettings(
            f"LLAMA_TENSOR_PARALLEL is {tensor} and the model has {heads} heads over {kv_heads} key/value "
            f"heads, {mlp} wide in its MLP; set it to a number that divides them"
        )
    return pipeline or max(gpus // tensor, 1), tensor


def assume_identical(gpus: Sequence[Gpu], workers: int) -> tuple[Gpu, ...]:
    """The cards of all workers: those of other machines are assumed to be like the smallest one here."""
    return (min(gpus, key=lambda gpu: gpu.free),) * workers if gpus else ()


def bytes_of_weights(
    config: LlamaConfig, quantization: Quantization, dtype: torch.dtype = torch.bfloat16
) -> int:
    """As in this module's docstring. Everything that is not a linear layer is held in `dtype`."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    heads, kv_heads = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    attention = [(heads, hidden), (kv_heads, hidden), (kv_heads, hidden), (hidden, heads)]
    layer = [*attention, (mlp, hidden), (mlp, hidden), (hidden, mlp)]
    linears = sum(bytes_of_weight(*shape, quantization, dtype) for shape in layer)
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden
    norms = (2 * config.num_hidden_layers + 1) * hidden
    return int(config.num_hidden_layers * linears + dtype.itemsize * (tables + norms))


def bytes_per_token(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers: 2 x layers x KV heads x head_dim x element size."""
    heads = config.num_key_value_heads * config.head_dim
    return int(2 * config.num_hidden_layers * heads * dtype.itemsize)
