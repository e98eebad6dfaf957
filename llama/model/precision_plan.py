"""Calculates which precision fits which GPUs, without loading anything.

Knows arithmetic on a model's configuration; knows nothing about files or how a layer computes.

Each of the 70B's 80 layers has 855,638,016 weights in linear layers. The embeddings and the output layer have
524,288,000 weights and the norms 1,318,912. These are not quantized: in 16 bits they take 1.05 GB.

    precision   bytes in linear layers              linear layers   all weights
    none        2 per weight                        136.90 GB       137.95 GB
    fp8, int8   1 per weight, 4 per output           68.48 GB        69.53 GB
    nf4         1/2 per weight, 4 per 64 weights     38.50 GB        39.55 GB

The cache takes 2 x 80 layers x 8 KV heads x 128 x 2 bytes = 327,680 bytes per token, which is 1.34 GB for
4,096 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import LlamaConfig

from llama.errors import BadConfig, BadSettings, DoesNotFit
from llama.model.fp8_linear import refusals_of_fp8
from llama.model.gpu_reserve import gpu_reserve
from llama.model.quantized_layers import Quantization, bytes_of_weight
from llama.settings import EngineName

ENOUGH_REQUESTS = 8
"""`auto` takes the first precision that leaves memory for this many requests."""
_TYPICAL_CONTEXT = 2048  # tokens; few requests are longer
VLLM_RESERVE = 2 * 2**30
"""Bytes of each GPU for activations and graphs of vLLM (estimated). vLLM also leaves a tenth of it free."""

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
"""The same as the 70B's own config.json, to plan with before its weights have been downloaded."""

_ORDER: tuple[Quantization, ...] = ("none", "fp8", "int8", "nf4")
_CAPABILITY: dict[Quantization, tuple[int, int]] = {
    "none": (7, 5),  # the oldest for which torch 2.11 is built
    "fp8": (8, 9),
    "int8": (7, 5),
    "nf4": (7, 5),
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU."""

    name: str
    free: int
    """Free memory in bytes."""
    capability: tuple[int, int]
    """CUDA compute capability."""


@dataclass(frozen=True, slots=True)
class PrecisionOption:
    """A precision, the memory that it takes, and whether it fits: one row of the table that `plan` prints."""

    quantization: Quantization
    weights: int
    """Bytes of weights on all GPUs together."""
    cache: int
    """Bytes that remain for keys and values on all GPUs together."""
    requests: int
    """The number of concurrent requests of full context that fit; the server's own limit may be lower."""
    refusal: str
    """Why the GPUs cannot serve this precision, or "" if they can."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All precisions, and the one that LLAMA_QUANTIZATION=auto chooses; None if none of them fits."""

    choices: tuple[PrecisionOption, ...]
    chosen: PrecisionOption | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Calculates what fits on a set of GPUs together, for requests of `context` tokens on `engine`."""

    config: LlamaConfig
    gpus: tuple[Gpu, ...]
    """Empty for the CPU, where every precision is assumed to fit. `plan` requires at least one GPU."""
    context: int
    rows: int
    """The most requests that the engine runs at a time."""
    flash_attention: bool
    """Whether the torch engine uses flash attention on these GPUs."""
    cuda_graphs: bool = True
    """Whether the torch engine captures graphs."""
    engine: EngineName
    dtype: torch.dtype = torch.bfloat16
    """The dtype of everything that is not quantized, including the cache."""
    stored: Quantization | None = "none"
    """The precision in which the checkpoint stores its linear layers. A checkpoint that is already quantized
    keeps its precision. None for a format that only vLLM can read."""

    def plan(self) -> Plan:
        """Calculate what every precision needs, and choose one. Raises BadConfig.

        The chosen one is the first of 16 bits, FP8, int8 and NF4 that leaves memory for ENOUGH_REQUESTS: of
        full context for 16 bits, and of at most _TYPICAL_CONTEXT tokens for the others. On GPUs without FP8,
        NF4 comes before int8, because a step moves fewer bytes (calculated). If none leaves that much memory,
        it is the one that leaves the most.
        """
        stored = self._readable()
        choices = tuple(map(self._choice, _ORDER if stored == "none" else (stored,)))
        fitting = [choice for choice in choices if not choice.refusal]
        if self._oldest < _CAPABILITY["fp8"]:
            fitting.sort(key=lambda choice: choice.quantization == "int8")
        enough = [choice for choice in fitting if self._is_enough(choice)]
        chosen = enough[0] if enough else max(fitting, key=lambda choice: choice.cache, default=None)
        return Plan(choices, chosen)

    def pick(self, requested: Quantization | Literal["auto"]) -> Quantization:
        """Return the precision to serve in. Raises BadConfig, BadSettings, or DoesNotFit, whose message names
        precisions or GPUs that would fit."""
        stored = self._readable()
        if stored != "none" and requested not in ("auto", stored):
            raise BadSettings(
                f"LLAMA_QUANTIZATION is {requested}, but the checkpoint is stored in {stored}; unset it"
            )
        if not self.gpus:
            return stored if requested == "auto" else requested
        found = self.plan()
        cards = " and ".join(sorted({gpu.name for gpu in self.gpus}))
        if requested == "auto":
            if found.chosen is None:
                listed = ", ".join(f"{c.quantization!r} {c.refusal}" for c in found.choices)
                raise DoesNotFit(f"no precision fits on {cards}: {listed}; {self._advice()}")
            return found.chosen.quantization
        (choice,) = (choice for choice in found.choices if choice.quantization == requested)
        if choice.refusal:
            fitting = [c.quantization for c in found.choices if not c.refusal]
            advice = f"set LLAMA_QUANTIZATION to {' or '.join(fitting)}" if fitting else self._advice()
            raise DoesNotFit(
                f"LLAMA_QUANTIZATION is {requested}, which cannot be served on {cards}: it {choice.refusal}; "
                f"{advice}"
            )
        return requested

    def _readable(self) -> Quantization:
        """The stored precision. Raises BadConfig if only vLLM can read it."""
        if self.stored is None:
            raise BadConfig(
                "config.json describes a quantization, such as AWQ or GPTQ, that the torch engine cannot "
                "read and whose memory `plan` cannot calculate; set LLAMA_ENGINE to vllm, which may support "
                "it, or use weights that are unquantized, in bitsandbytes' int8 or NF4, or in FP8 with one "
                "scale per row (fbgemm_fp8)"
            )
        return self.stored

    def _choice(self, quantization: Quantization) -> PrecisionOption:
        weights = bytes_of_weights(self.config, quantization, self.dtype)
        room = self._room(quantization)
        cache = max(room - weights, 0)
        requests = cache // (self.context * bytes_per_token(self.config, self.dtype))
        refusals = self._refusals(quantization, weights, room, requests)
        return PrecisionOption(quantization, weights, cache, requests, " and ".join(refusals))

    def _is_enough(self, choice: PrecisionOption) -> bool:
        tokens = self.context if choice.quantization == "none" else min(self.context, _TYPICAL_CONTEXT)
        return choice.cache >= ENOUGH_REQUESTS * tokens * bytes_per_token(self.config, self.dtype)

    def _room(self, quantization: Quantization) -> int:
        """Bytes for weights and cache on all GPUs together. Layers are divided evenly, so every GPU counts as
        much as the one with the least free memory."""
        reserve = VLLM_RESERVE if self.engine == "vllm" else self._reserve(quantization)
        return len(self.gpus) * max(min(gpu.free for gpu in self.gpus) - reserve, 0)

    def _reserve(self, quantization: Quantization) -> int:
        """Bytes of a GPU that the torch engine needs in addition to weights and cache."""
        limits = {"rows": self.rows, "context": self.context}
        reserve = gpu_reserve(
            self.config, quantization, self.dtype, **limits, flash_attention=self.flash_attention
        )
        return reserve.total if self.cuda_graphs else reserve.without_graphs

    @property
    def _oldest(self) -> tuple[int, int]:
        """The lowest compute capability of the GPUs."""
        return min(gpu.capability for gpu in self.gpus)

    def _refusals(self, quantization: Quantization, weights: int, room: int, requests: int) -> Iterator[str]:
        if weights > room:
            yield f"needs {weights / 1e9:.1f} GB for weights ({room / 1e9:.1f} GB available)"
        elif requests < 1:
            yield f"leaves no memory for one request of {self.context} tokens"
        if self._oldest < _CAPABILITY[quantization]:
            needed, had = (".".join(map(str, c)) for c in (_CAPABILITY[quantization], self._oldest))
            yield f"needs compute capability {needed} (the GPU has {had})"
        if quantization == "fp8" and self.engine == "torch":
            yield from refusals_of_fp8(self.config, self._oldest)
        if quantization in ("int8", "nf4") and self.engine == "vllm":
            yield "is not supported by vLLM"

    def _advice(self) -> str:
        stored = self._readable()
        refused = self._oldest < _CAPABILITY["fp8"] or any(refusals_of_fp8(self.config, self._oldest))
        if stored == "fp8" and refused:
            return "use weights that are unquantized, or in bitsandbytes' int8 or NF4"
        narrowest = stored if stored != "none" else "nf4"
        request = self.context * bytes_per_token(self.config, self.dtype)
        needed = bytes_of_weights(self.config, narrowest, self.dtype) + request + self._reserve(narrowest)
        return (
            f"use LLAMA_ENGINE=torch on a GPU with {math.ceil(needed / 1e9)} GB free (for {narrowest!r} and "
            f"one request of {self.context} tokens), set a smaller LLAMA_MAX_CONTEXT, or use more GPUs with "
            "LLAMA_ENGINE=vllm"
        )


def bytes_of_weights(
    config: LlamaConfig, quantization: Quantization, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Bytes of a model's weights; see this module's docstring. `dtype` is the type of unquantized weights."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    heads, kv_heads = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    attention = [(heads, hidden), (kv_heads, hidden), (kv_heads, hidden), (hidden, heads)]
    layer = [*attention, (mlp, hidden), (mlp, hidden), (hidden, mlp)]
    linears = sum(bytes_of_weight(*shape, quantization, dtype) for shape in layer)
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden
    norms = (2 * config.num_hidden_layers + 1) * hidden
    return int(config.num_hidden_layers * linears + dtype.itemsize * (tables + norms))


def bytes_per_token(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values per token: 2 x layers x KV heads x head_dim x element size."""
    heads = config.num_key_value_heads * config.head_dim
    return int(2 * config.num_hidden_layers * heads * dtype.itemsize)
