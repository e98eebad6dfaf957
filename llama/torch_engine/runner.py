"""One step of the model: a forward of our own over the modules that transformers loaded.

Layers are called as modules (`q_proj`, `mlp` and so on), so quantized and adapted ones serve as they
come. Knows tensors, positions and slots; knows nothing of requests. Its reference in the tests is
`model(ids).logits`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from llama.torch_engine.kv_cache import KVCache

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer index, queries [N, heads, D], keys and values [N, KV heads, D] to outputs [N, heads x D]."""

_ROUND_UP = 64  # cached positions are read in multiples, so that few shapes occur


class Runner:
    """N is the number of tokens in a step, B of requests, V the vocabulary, D the head dimension."""

    def __init__(self, model: LlamaForCausalLM, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self.device = model.device
        self._scale = model.model.layers[0].self_attn.scaling
        positions = torch.arange(cache.plan.length, device=self.device)
        with torch.inference_mode():
            # Any rope scaling is in these tables: they come from the model's own rotary module.
            cos, sin = model.model.rotary_emb(model.get_input_embeddings().weight, positions[None])
        self._cos, self._sin = cos[0, :, None], sin[0, :, None]  # [length, 1, D]

    @torch.inference_mode()
    def prefill(self, slot: int, token_ids: Tensor, start: int) -> Tensor:
        """Put `token_ids` [N] into a slot at `start`, after what is there. Logits of the last: [1, V]."""
        end = start + len(token_ids)
        positions = torch.arange(start, end, device=self.device)
        visible = torch.arange(end, device=self.device) <= positions[:, None]  # [N, end]

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            cached_keys, cached_values = self._cache.keys[layer][slot], self._cache.values[layer][slot]
            cached_keys[:, start:end] = keys.transpose(0, 1)
            cached_values[:, start:end] = values.transpose(0, 1)
            attended = F.scaled_dot_product_attention(
                queries.transpose(0, 1)[None],
                cached_keys[None, :, :end],
                cached_values[None, :, :end],
                attn_mask=visible,
                scale=self._scale,
                enable_gqa=True,
            )
            return attended[0].transpose(0, 1).flatten(1)

        return self._logits(self._hidden(token_ids, positions, attend)[-1:])

    @torch.inference_mode()
    def decode(self, slots: list[int], token_ids: Tensor, positions: list[int]) -> Tensor:
        """One token for each of B requests: `token_ids` [B] at `positions` of `slots`. Logits [B, V]."""
        rows, at = self._index(slots), self._index(positions)
        # The lowest slots are taken first, so a view of the first `height` holds few that are not asked for.
        height = max(slots) + 1
        length = min(-(-(max(positions) + 1) // _ROUND_UP) * _ROUND_UP, self._cache.plan.length)
        last = torch.zeros(height, dtype=torch.long, device=self.device).index_copy_(0, rows, at)
        hidden_positions = torch.arange(length, device=self.device) > last[:, None]
        bias = torch.zeros(height, 1, 1, length, device=self.device)
        bias.masked_fill_(hidden_positions[:, None, None], float("-inf"))

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            cached_keys, cached_values = self._cache.keys[layer], self._cache.values[layer]
            cached_keys[rows, :, at] = keys
            cached_values[rows, :, at] = values
            groups = queries.shape[1] // keys.shape[1]  # query heads that share a KV head
            grouped = queries.new_zeros(height, keys.shape[1], groups, keys.shape[2])
            grouped[rows] = queries.view(-1, *grouped.shape[1:])
            # Two plain products: on a CPU several times quicker than the fused kernel for one query.
            scores = grouped @ cached_keys[:height, :, :length].transpose(2, 3) * self._scale
            weights = torch.softmax(scores + bias, dim=-1, dtype=torch.float32).to(values.dtype)
            return (weights @ cached_values[:height, :, :length])[rows].flatten(1)

        return self._logits(self._hidden(token_ids, at, attend))

    def _hidden(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states after the last layer, not yet normalised: [N, hidden]."""
        cos, sin = self._cos[positions], self._sin[positions]
        x: Tensor = self._model.get_input_embeddings()(token_ids)
        for index, layer in enumerate(self._model.model.layers):
            attention = layer.self_attn
            h = _normalised(layer.input_layernorm, x)
            heads = (len(token_ids), -1, attention.head_dim)
            queries = _rotated(attention.q_proj(h).view(heads), cos, sin)
            keys = _rotated(attention.k_proj(h).view(heads), cos, sin)
            x = x + attention.o_proj(attend(index, queries, keys, attention.v_proj(h).view(heads)))
            x = x + layer.mlp(_normalised(layer.post_attention_layernorm, x))
        return x

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.lm_head(_normalised(self._model.model.norm, hidden))
        return logits.float()

    def _index(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)


def _normalised(norm: Any, x: Tensor) -> Tensor:
    """A LlamaRMSNorm, by torch's own kernel."""
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [N, heads, D] in the half-split layout of transformers."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
