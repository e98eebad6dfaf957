"""Puts the tensors of a checkpoint into the modules of a model, and finds out which are missing or wrong.

The modules have no memory at first. Knows modules, tensors and how a layer is stored; knows nothing of files.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llama.errors import BadCheckpoint
from llama.model.placement import Placement
from llama.model.quantized_layers import (
    STORED_SCALE,
    Quantization,
    from_stored,
    linear,
    quantize,
    stored_names,
    stored_shape,
)

# Rotary tables of old checkpoints, and the layout of int8 weights, of which there is one.
_SAYS_NOTHING = (".rotary_emb.inv_freq", ".weight_format")


class ModelAssembler:
    def __init__(
        self,
        model: LlamaForCausalLM,
        names: frozenset[str],
        placement: Placement,
    ) -> None:
        self._model, self._names = model, names
        self._placement = placement
        self._comes_quantized = any(name.endswith(tuple(STORED_SCALE.values())) for name in names)
        # Every module that has parameters of its own.
        self._missing = {
            name: module for name, module in model.named_modules() if module._parameters and name != "lm_head"
        }
        if not model.config.tie_word_embeddings:
            self._missing["lm_head"] = model.lm_head
        self._known = frozenset(self._missing)
        self._parts: dict[str, dict[str, Tensor]] = {}
        self._unexpected = list[str]()
        self._of_another_shape = list[str]()

    def add(self, name: str, tensor: Tensor) -> None:
        owner, part = self._split(name)
        wanted = self._wanted(owner) if owner in self._missing else frozenset[str]()
        if part not in wanted:
            tied = name == "lm_head.weight" and "lm_head" not in self._known  # a copy of the embeddings
            if not name.endswith(_SAYS_NOTHING) and not tied:
                self._unexpected.append(name)
            return
        parts = self._parts.setdefault(owner, {})
        # What is quantized becomes memory of its own; all else is copied out of the file's.
        parts[part] = tensor.to(self._placement.device, copy=not self._is_quantized_here(owner))
        if wanted <= parts.keys():
            self._place(owner, self._missing.pop(owner), self._parts.pop(owner))

    def check_complete(self, folder: Path) -> None:
        missing = [
            f"{owner}.{part}"
            for owner in self._missing
            for part in self._wanted(owner) - self._parts.get(owner, {}).keys()
        ]
        for problem, names in (
            ("lacks {} tensors that config.json implies", missing),
            ("has {} tensors of another shape than config.json implies", self._of_another_shape),
            ("has {} tensors that config.json does not imply", self._unexpected),
        ):
            if names:
                raise BadCheckpoint(
                    f"the checkpoint in {folder} {problem.format(len(names))}, {min(names)} among them; "
                    "copy the files that belong together"
                )

    def _split(self, name: str) -> tuple[str, str]:
        """The module that a tensor belongs to, and its name there, in which there may be dots."""
        owner, _, part = name.rpartition(".")
        while owner and owner not in self._known:
            owner, _, more = owner.rpartition(".")
            part = f"{more}.{part}"
        return owner, part

    def _stored(self, owner: str) -> Quantization:
        """What a layer is stored in: every checkpoint leaves some in 16 bits."""
        for quantization, scale in STORED_SCALE.items():
            if f"{owner}.{scale}" in self._names:
                return quantization
        return "none"

    def _wanted(self, owner: str) -> frozenset[str]:
        return stored_names(
            self._stored(owner),
            bias=getattr(self._missing[owner], "bias", None) is not None,
            nested=f"{owner}.weight.nested_absmax" in self._names,
        )

    def _place(self, owner: str, module: nn.Module, parts: dict[str, Tensor]) -> None:
        assert isinstance(module.weight, Tensor)
        expected = tuple(module.weight.shape)
        if not isinstance(module, nn.Linear):
            if parts["weight"].shape != expected:
                self._of_another_shape.append(f"{owner}.weight")
            else:
                module.weight = nn.Parameter(parts["weight"].to(self._placement.dtype), requires_grad=False)
            return
        layer = self._layer(owner, parts)
        bias = parts.get("bias")
        if stored_shape(layer) != expected or (bias is not None and bias.shape != expected[:1]):
            self._of_another_shape.append(f"{owner}.weight")
        else:
            self._model.set_submodule(owner, layer)

    def _layer(self, owner: str, parts: dict[str, Tensor]) -> nn.Module:
        if "bias" in parts:
            parts["bias"] = parts["bias"].to(self._placement.dtype)
        if self._is_quantized_here(owner):
            return quantize(
                parts["weight"], parts.get("bias"), self._placement.quantization, self._placement.arithmetic
            )
        if (stored := self._stored(owner)) != "none":
            return from_stored(parts, stored, self._placement.arithmetic)
        return linear(parts["weight"].to(self._placement.dtype), parts.get("bias"))

    def _is_quantized_here(self, owner: str) -> bool:
        """Linear layers of the decoder, unless the checkpoint comes quantized: it knows what to leave."""
        layer = owner.startswith("model.layers.") and isinstance(self._model.get_submodule(owner), nn.Linear)
        return layer and self._placement.quantization != "none" and not self._comes_quantized
