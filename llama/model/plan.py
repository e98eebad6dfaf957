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

from llama.errors import BadSettings, DoesNotFit
from llama.model.quantization import Quantization, bytes_of_weight

ENOUGH_REQUESTS = 8
"""At full context: what a precision must leave room for, for `auto` to take it over a narrower one."""

RESERVE = {"torch": 3 * 2**30, "vllm": 2 * 2**30}
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
class Choice:
    """One row of the table."""

    quantization: Quantization
    weights: int
    """Bytes, over all GPUs."""
    cache: int
    """Bytes left for keys and values, over all GPUs."""
    requests: int
    """How many of full context the cache holds at once; the server may be set to take fewer."""
    engine: Literal["torch", "vllm"]
    refusal: str
    """Why these GPUs cannot; "" when they can."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What fits, and what `auto` takes."""

    choices: tuple[Choice, ...]
    auto: Choice | None


def plan(
    config: LlamaConfig,
    gpus: Sequence[Gpu],
    *,
    context: int,
    stored: Quantization = "none",
    engine: Literal["torch", "vllm"] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Plan:
    """All precisions on these GPUs together, for requests of `context` tokens. A checkpoint that is
    `stored` in fewer bits stays so. `engine`: by default ours on one GPU, and vLLM on more. `dtype` is what
    everything that is not quantized is held in, the cache included: 16 bits in what follows.

    `auto` is the first of 16 bits, FP8, int8 and NF4 that leaves room for ENOUGH_REQUESTS; else the one
    with most room, if it has room for one.
    """
    offered = _ORDER if stored == "none" else (stored,)
    engine = engine or ("torch" if len(gpus) == 1 else "vllm")
    choices = tuple(_choice(config, gpus, quantization, context, engine, dtype) for quantization in offered)
    fitting = [choice for choice in choices if not choice.refusal]
    enough = [choice for choice in fitting if choice.requests >= ENOUGH_REQUESTS]
    auto = enough[0] if enough else max(fitting, key=lambda choice: choice.requests, default=None)
    return Plan(choices, auto)


def pick(
    config: LlamaConfig,
    gpus: Sequence[Gpu],
    wanted: Quantization | Literal["auto"],
    *,
    context: int,
    stored: Quantization,
    engine: Literal["torch", "vllm"] = "torch",
    dtype: torch.dtype = torch.bfloat16,
) -> Quantization:
    """What these GPUs serve with an engine. Raises DoesNotFit, saying what would fit."""
    found = plan(config, gpus, context=context, stored=stored, engine=engine, dtype=dtype)
    cards = " and ".join(sorted({gpu.name for gpu in gpus}))
    if wanted == "auto":
        if found.auto is None:
            raise DoesNotFit(f"{_listed(found)} on {cards}; {_advice(config, context, stored, dtype)}")
        return found.auto.quantization
    (choice,) = (choice for choice in found.choices if choice.quantization == wanted)
    if choice.refusal:
        fitting = [c.quantization for c in found.choices if not c.refusal]
        advice = (
            f"set LLAMA_QUANTIZATION to {' or '.join(fitting)}"
            if fitting
            else _advice(config, context, stored, dtype)
        )
        raise DoesNotFit(f"{wanted} on {cards}: {choice.refusal}; {advice}")
    return wanted


def parallel_sizes(
    config: LlamaConfig, gpus: int, *, tensor: int | None, pipeline: int | None
) -> tuple[int, int]:
    """Pipeline stages and GPUs in each, for vLLM. None: all of a machine's `gpus`, tensor first, as far as
    the heads divide evenly. Raises BadSettings."""
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


def alike(gpus: Sequence[Gpu], workers: int) -> list[Gpu]:
    """All workers' cards: those of other machines are taken to be like the smallest here."""
    return [min(gpus, key=lambda gpu: gpu.free)] * workers if gpus else []


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


def _choice(
    config: LlamaConfig,
    gpus: Sequence[Gpu],
    quantization: Quantization,
    context: int,
    engine: Literal["torch", "vllm"],
    dtype: torch.dtype,
) -> Choice:
    weights = bytes_of_weights(config, quantization, dtype)
    # Layers are divided evenly: the smallest card bounds them all.
    room = len(gpus) * max(min(gpu.free for gpu in gpus) - RESERVE[engine], 0)
    cache = max(room - weights, 0)
    requests = cache // (context * bytes_per_token(config, dtype))
    return Choice(
        quantization,
        weights,
        cache,
        requests,
        engine,
        " and ".join(_refusals(gpus, quantization, weights, room, requests, context, engine)),
    )


def _refusals(
    gpus: Sequence[Gpu],
    quantization: Quantization,
    weights: int,
    room: int,
    requests: int,
    context: int,
    engine: Literal["torch", "vllm"],
) -> Iterator[str]:
    if weights > room:
        yield f"needs {weights / 1e9:.1f} GB for weights and has {room / 1e9:.1f}"
    elif requests < 1:
        yield f"has no room for one request of {context} tokens beside {weights / 1e9:.1f} GB of weights"
    oldest = min(gpu.capability for gpu in gpus)
    if oldest < _CAPABILITY[quantization]:
        wanted = ".".join(map(str, _CAPABILITY[quantization]))
        yield f"needs compute capability {wanted} and has {oldest[0]}.{oldest[1]}"
    if quantization in ("int8", "nf4") and engine == "vllm":
        yield "is not for vLLM, which has no bitsandbytes any more"


def _listed(table: Plan) -> str:
    return "nothing fits: " + ", ".join(f"{c.quantization} {c.refusal}" for c in table.choices)


def _advice(config: LlamaConfig, context: int, stored: Quantization, dtype: torch.dtype) -> str:
    narrowest = stored if stored != "none" else "nf4"
    cache = context * bytes_per_token(config, dtype)
    needed = bytes_of_weights(config, narrowest, dtype) + cache + RESERVE["torch"]
    return (
        f"take a GPU with {needed / 1e9:.0f} GB free ({narrowest}, one request of {context} tokens), "
        "set a smaller LLAMA_MAX_CONTEXT, or use several GPUs"
    )
