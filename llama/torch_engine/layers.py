"""The parts of a transformers LlamaForCausalLM that a step calls, taken out of the model.

Projections of the same input are joined and, on a CPU, packed (`linears.py`). The layers are removed from the
model, so that no weight is in memory twice. Knows the attributes of transformers' modules; knows nothing
about attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llama.errors import DoesNotFit
from llama.model.placement import Placement
from llama.torch_engine.linears import Scratch, packed, packed_together


class Norm(NamedTuple):
    """A root-mean-square norm."""

    weight: Tensor
    """[hidden]"""
    epsilon: float


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. Each linear layer takes [N, its input width] and returns [N, its output width]."""

    attention_norm: Norm
    qkv: nn.Module
    """Returns queries, keys and values, concatenated: [N, (heads + 2 x KV heads) x head_dim]."""
    output: nn.Module
    mlp_norm: Norm
    gate_up: nn.Module
    """Returns gates and up-projections, concatenated."""
    activation: Callable[[Tensor], Tensor]
    """The function of the gates. If the model uses SiLU, it is `F.silu` itself, so that kernels know it."""
    down: nn.Module


@dataclass(frozen=True, slots=True)
class ModelParts:
    """A complete model. It computes in `dtype`, whatever the type of the stored weights is."""

    embedding: nn.Module
    cos: Tensor
    """[positions, 1, head_dim], including any rope scaling. `sin` has the same shape."""
    sin: Tensor
    stretched_from: int
    """0 if rope scaling does not depend on the length of a request. Otherwise, the rows of `cos` and `sin`
    before this index are for requests of at most this many tokens, and the rows from this index on are for
    longer requests. Both parts start with position 0."""
    layers: list[Layer]
    norm: Norm
    head: nn.Module
    heads: int
    """The number of query heads."""
    dtype: torch.dtype
    device: torch.device
    scale: float
    """The factor of attention scores."""


@torch.inference_mode()
def take_apart(
    model: LlamaForCausalLM, placement: Placement, layers: Sequence[Layer] | None = None
) -> ModelParts:
    """Return the parts of a model that was loaded with `placement`. The model cannot be used afterwards.

    `layers` are the decoder layers of the model if they have been taken out before.
    """
    dtype, device = placement.arithmetic, placement.device
    cos, sin, stretched_from = _rotary_tables(model, placement.context, dtype)
    if layers is None:
        scratch, modules = Scratch(), model.model.layers
        layers = [take_layer(modules, index, dtype, scratch) for index in range(len(modules))]
    return ModelParts(
        embedding=model.get_input_embeddings(),
        cos=cos,
        sin=sin,
        stretched_from=stretched_from,
        layers=list(layers),
        norm=_norm(model.model.norm, dtype),
        head=packed(model.lm_head, dtype),
        heads=model.config.num_attention_heads,
        dtype=dtype,
        device=device,
        scale=model.config.head_dim**-0.5,
    )


def _rotary_tables(model: LlamaForCausalLM, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Return `cos`, `sin` and `stretched_from` of `ModelParts`.

    In transformers, dynamic scaling changes with every token beyond the trained positions. Keys that are
    already rotated and cached cannot change with it. So here, a request that may grow beyond the trained
    positions uses the scaling for the whole context from its first token on.
    """
    config, device = model.config, model.device
    scaling, trained = config.rope_parameters, int(config.max_position_embeddings)
    if scaling["rope_type"] == "longrope":
        trained = int(scaling.get("original_max_position_embeddings") or trained)
    by_length = scaling["rope_type"] in ("dynamic", "longrope")
    stretched_from = trained if by_length and length > trained else 0
    tables = []
    try:
        for count in (stretched_from, length) if stretched_from else (length,):
            positions = torch.arange(count, device=device)
            tables.append(model.model.rotary_emb(torch.empty(0, dtype=dtype, device=device), positions[None]))
    except RuntimeError as error:
        raise DoesNotFit(
            f"there is not enough memory for position tables for a context of {length} tokens ({error}); "
            "set a smaller LLAMA_MAX_CONTEXT"
        ) from error
    cos, sin = (torch.cat(table, dim=1)[0, :, None] for table in zip(*tables, strict=True))
    return cos, sin, stretched_from


@torch.inference_mode()
def take_layer(layers: nn.ModuleList, index: int, dtype: torch.dtype, scratch: Scratch) -> Layer:
    """Take a decoder layer out of a model. The result computes in `dtype`."""
    layer: Any = layers[index]
    attention, mlp = layer.self_attn, layer.mlp
    taken = Layer(
        attention_norm=_norm(layer.input_layernorm, dtype),
        qkv=packed_together([attention.q_proj, attention.k_proj, attention.v_proj], dtype, scratch),
        output=packed_together([attention.o_proj], dtype, scratch),
        mlp_norm=_norm(layer.post_attention_layernorm, dtype),
        gate_up=packed_together([mlp.gate_proj, mlp.up_proj], dtype, scratch),
        activation=F.silu if attention.config.hidden_act == "silu" else mlp.act_fn,
        down=packed_together([mlp.down_proj], dtype, scratch),
    )
    layers[index] = nn.Identity()  # releases the weights that were copied
    # Before the next layer: otherwise its joined weights would fragment the free memory, and a cache needs
    # large blocks. Has no effect if CUDA is not in use.
    torch.cuda.empty_cache()
    return taken


def _norm(module: Any, dtype: torch.dtype) -> Norm:
    return Norm(module.weight.detach().to(dtype), module.variance_epsilon)
