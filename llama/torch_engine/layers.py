"""The parts of a transformers LlamaForCausalLM that a step calls, taken out of the model.

Projections of the same input are joined and, on a CPU, packed (`linears.py`). The model gives its
layers away, so that no weight is held twice. Knows transformers' names; knows nothing of attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llama.errors import DoesNotFit
from llama.model.placement import Placement
from llama.torch_engine.linears import joined, packed


class Norm:
    """A LlamaRMSNorm, by torch's own kernel."""

    def __init__(self, norm: Any, dtype: torch.dtype) -> None:
        self._weight, self._epsilon = norm.weight.detach().to(dtype), norm.variance_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self._weight.shape, self._weight, self._epsilon)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer; each call takes [N, its input width] and gives [N, its output width]."""

    attention_norm: Norm
    qkv: nn.Module
    """To queries, keys and values side by side: (heads + 2 x KV heads) x head_dim."""
    output: nn.Module
    mlp_norm: Norm
    gate_up: nn.Module
    activation: nn.Module
    down: nn.Module

    def mlp(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        result: Tensor = self.down(self.activation(gate) * up)
        return result


@dataclass(frozen=True, slots=True)
class ModelParts:
    """A whole model. Arithmetic is in `dtype`, whatever the weights are held in."""

    embedding: nn.Module
    cos: Tensor
    """[positions, 1, head_dim], any rope scaling included; so is `sin`."""
    sin: Tensor
    stretched_from: int
    """If rope scaling depends on a request's length, the rows from here on are the positions, from 0 on, of
    requests that may end beyond as many tokens; otherwise 0."""
    layers: list[Layer]
    norm: Norm
    head: nn.Module
    heads: int
    """Of queries."""
    dtype: torch.dtype
    device: torch.device
    scale: float
    """Of attention scores."""


@torch.inference_mode()
def take_apart(model: LlamaForCausalLM, placement: Placement) -> ModelParts:
    """The parts of a model that is placed like this. The model is not usable afterwards."""
    dtype, device = placement.arithmetic, placement.device
    cos, sin, stretched_from = _rotary_tables(model, placement.context, dtype)
    scale = model.model.layers[0].self_attn.scaling
    return ModelParts(
        embedding=model.get_input_embeddings(),
        cos=cos,
        sin=sin,
        stretched_from=stretched_from,
        layers=[_take_layer(model.model.layers, index, dtype) for index in range(len(model.model.layers))],
        norm=Norm(model.model.norm, dtype),
        head=packed(model.lm_head, dtype),
        heads=model.config.num_attention_heads,
        dtype=dtype,
        device=device,
        scale=scale,
    )


def _rotary_tables(model: LlamaForCausalLM, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """The tables of `ModelParts`. transformers changes dynamic scaling with every token beyond the trained
    positions, which a cache of rotated keys cannot follow: here such requests are stretched for the whole
    context from their beginning."""
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
            f"the memory does not hold position tables for {length} tokens of context ({error}); set a "
            "smaller LLAMA_MAX_CONTEXT"
        ) from error
    cos, sin = (torch.cat(table, dim=1)[0, :, None] for table in zip(*tables, strict=True))
    return cos, sin, stretched_from


def _take_layer(layers: nn.ModuleList, index: int, dtype: torch.dtype) -> Layer:
    layer: Any = layers[index]
    attention, mlp = layer.self_attn, layer.mlp
    taken = Layer(
        attention_norm=Norm(layer.input_layernorm, dtype),
        qkv=packed(joined([attention.q_proj, attention.k_proj, attention.v_proj]), dtype),
        output=packed(attention.o_proj, dtype),
        mlp_norm=Norm(layer.post_attention_layernorm, dtype),
        gate_up=packed(joined([mlp.gate_proj, mlp.up_proj]), dtype),
        activation=mlp.act_fn,
        down=packed(mlp.down_proj, dtype),
    )
    layers[index] = nn.Identity()  # lets go of the weights that were copied
    # At once: the next layer's joined weights would split what is free into pieces too small for a cache.
    torch.cuda.empty_cache()  # nothing where CUDA is not in use
    return taken
