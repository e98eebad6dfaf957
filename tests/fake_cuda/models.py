"""Models of fake tensors, loaded and taken apart by the engine's own code."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llama.model.assembly import ModelAssembler
from llama.model.loader import empty_model
from llama.model.placement import Placement, place
from llama.model.precision_plan import LLAMA_2_70B
from llama.model.quantized_layers import STORED_SCALE, Quantization
from llama.settings import Settings
from llama.torch_engine.kv_cache import CacheShape, KVCache
from llama.torch_engine.layers import ModelParts, take_apart
from llama.torch_engine.rows import Rows
from llama.torch_engine.runner import Runner
from llama.torch_engine.sampler import Sampler

EOS = 2
SMALL = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)
BIASED = LlamaConfig(
    **{
        **SMALL.to_dict(),
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    }
)
"""A model with what the 70B does not have: biases, tied embeddings, and scaled positions."""


def llama_2_70b(layers: int) -> LlamaConfig:
    """The 70B's configuration with fewer layers."""
    config = copy.copy(LLAMA_2_70B)
    config.num_hidden_layers = layers
    return config


def placement_of(config: LlamaConfig, **settings: Any) -> Placement:
    """Decide the placement on the fake GPU, which must replace torch's."""
    return place(Settings(device="cuda:0", **settings), config)


def load(config: LlamaConfig, placement: Placement, stored: Quantization = "none") -> LlamaForCausalLM:
    """Load a model from a checkpoint of fake tensors on the CPU. Its decoder layers are stored in 16 bits, FP8 or int8.

    NF4 is not supported, because bitsandbytes reads numbers of its checkpoints on the CPU.
    """
    tensors = dict(_checkpoint(config, stored))
    model = empty_model(config, placement.device)
    assembler = ModelAssembler(model, frozenset(tensors), placement)
    for name, tensor in tensors.items():
        assembler.add(name, tensor)
    assembler.end_file()
    assembler.check_complete(Path("fake"))
    model.tie_weights()
    return model


def _checkpoint(config: LlamaConfig, stored: Quantization) -> Iterator[tuple[str, Tensor]]:
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, tensor in model.state_dict().items():
        shape, quantized = tuple(tensor.shape), stored != "none" and name.endswith("_proj.weight")
        dtype = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}[stored] if quantized else torch.bfloat16
        yield name, torch.empty(shape, dtype=dtype)
        if quantized:
            scale_shape = (shape[0], 1) if stored == "fp8" else shape[:1]
            yield f"{name.removesuffix('weight')}{STORED_SCALE[stored]}", torch.empty(scale_shape)


@dataclass(frozen=True)
class Step:
    """Everything that a step of the engine needs."""

    parts: ModelParts
    cache: KVCache
    rows: Rows
    runner: Runner
    sampler: Sampler

    def owner(self) -> Any:
        """Return a function that tells whether a tensor belongs to the weights, to the cache, or to neither."""
        owners = {layer.untyped_storage()._cdata: "cache" for layer in self.cache.layers}
        for _, tensor in tensors_of(self.parts):
            owners[tensor.untyped_storage()._cdata] = "weights"
        return lambda tensor: owners.get(tensor.untyped_storage()._cdata, "other_reads")


def step_of(config: LlamaConfig, placement: Placement, rows: int, length: int) -> Step:
    """Load a model, take it apart, and create a cache, a runner and a sampler for it."""
    return step_for(take_apart(load(config, placement), placement), config, placement, rows, length)


def step_for(parts: ModelParts, config: LlamaConfig, placement: Placement, rows: int, length: int) -> Step:
    """Create a cache, a runner and a sampler for a model that has been taken apart."""
    cache = KVCache.for_placement(config, CacheShape(rows, length), placement)
    state = Rows(cache)
    return Step(parts, cache, state, Runner(parts, state), Sampler(state, config.vocab_size, {EOS}))


def token_ids(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.long, device="cuda:0")


def tensors_of(thing: Any, path: str = "parts") -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors in parts of a model, including those of bitsandbytes' quantization states."""
    if isinstance(thing, Tensor):
        yield path, thing
        for name in ("quant_state", "CB", "SCB"):
            yield from tensors_of(getattr(thing, name, None), f"{path}.{name}")
    elif isinstance(thing, list | tuple):
        for index, item in enumerate(thing):
            yield from tensors_of(item, f"{path}[{index}]")
    elif isinstance(thing, nn.Module):
        for name, tensor in (*thing.named_parameters(), *thing.named_buffers()):
            yield from tensors_of(tensor, f"{path}.{name}")
    elif type(thing).__module__.startswith(("llama.", "bitsandbytes")):
        for name in getattr(type(thing), "__slots__", ()) or vars(thing):
            yield from tensors_of(getattr(thing, name, None), f"{path}.{name}")
