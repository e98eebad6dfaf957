"""Puts the tensors of a checkpoint into the modules of a model, and reports missing or wrong tensors.

The modules start without memory, on the meta device. Knows modules, tensors and how a layer is stored; knows
nothing about files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
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

# Old checkpoints store rotary tables, which are recomputed. `weight_format` names the layout of int8 weights,
# and only one layout exists.
_IGNORED = (".rotary_emb.inv_freq", ".weight_format")

_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.")

TakeLayer = Callable[[nn.ModuleList, int], object]
"""Takes the decoder layer with an index out of the list. The weights of its linear layers may still be in a
mapped file, so this function must copy them and then release them."""


class ModelAssembler:
    def __init__(
        self,
        model: LlamaForCausalLM,
        names: frozenset[str],
        placement: Placement,
        take_layer: TakeLayer | None = None,
    ) -> None:
        """`take_layer` is called for each decoder layer as soon as it is complete."""
        self._model, self._names = model, names
        self._placement, self._take_layer = placement, take_layer
        self._comes_quantized = any(name.endswith(tuple(STORED_SCALE.values())) for name in names)
        # Modules that own parameters directly, not only through their children.
        self._missing = {
            name: module for name, module in model.named_modules() if module._parameters and name != "lm_head"
        }
        if not model.config.tie_word_embeddings:
            self._missing["lm_head"] = model.lm_head
        self._known = frozenset(self._missing)
        self._missing_in_layer = Counter(map(_layer_of, self._missing))
        self._borrowed = dict[str, nn.Module]()  # modules whose weights are still in the mapped file
        self._parts: dict[str, dict[str, Tensor]] = {}
        self._unexpected = list[str]()
        self._wrong_shapes = dict[str, str]()

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor. A module is filled as soon as all of its tensors have been added."""
        owner, part = self._split(name)
        wanted = self._wanted(owner) if owner in self._missing else frozenset[str]()
        if part not in wanted:
            tied = name == "lm_head.weight" and "lm_head" not in self._known  # a copy of the embeddings
            if not name.endswith(_IGNORED) and not tied:
                self._unexpected.append(name)
            return
        parts = self._parts.setdefault(owner, {})
        # The tensor is in a mapped file, so it is copied now, unless it is quantized here or is lent.
        lent = self._is_lent(owner, wanted)
        parts[part] = tensor.to(self._placement.device, copy=not (lent or self._is_quantized_here(owner)))
        if not wanted <= parts.keys():
            return
        self._place(owner, self._missing.pop(owner), self._parts.pop(owner))
        if lent:
            self._borrowed[owner] = self._model.get_submodule(owner)
        self._hand_over(owner)

    def end_file(self) -> None:
        """Copy the weights that are still in the mapped file. To be called at the end of each file."""
        for module in self._borrowed.values():
            assert isinstance(module.weight, Tensor)
            module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        self._borrowed.clear()

    def check_complete(self, folder: Path) -> None:
        """Raises BadCheckpoint if tensors were missing, unexpected, or had the wrong shape."""
        missing = [
            f"{owner}.{part}"
            for owner in self._missing
            for part in self._wanted(owner) - self._parts.get(owner, {}).keys()
        ]
        wrong_shapes = [f"{name} ({shapes})" for name, shapes in self._wrong_shapes.items()]
        for problem, examples in (
            ("lacks {} that config.json requires", missing),
            ("has {} of the wrong shape", wrong_shapes),
            ("has {} that config.json does not describe", self._unexpected),
        ):
            if examples:
                several = len(examples) > 1
                count = f"{len(examples)} tensors" if several else "1 tensor"
                raise BadCheckpoint(
                    f"the checkpoint in {folder} {problem.format(count)}{', such as' if several else ':'} "
                    f"{min(examples)}; copy config.json and the weights of the same model"
                )

    def _hand_over(self, owner: str) -> None:
        """Call `take_layer` for a decoder layer if `owner` was the last of its modules that was missing."""
        layer = _layer_of(owner)
        if layer is None or self._take_layer is None:
            return
        self._missing_in_layer[layer] -= 1
        if self._missing_in_layer[layer] or any(_layer_of(name) == layer for name in self._wrong_shapes):
            return
        for name in [name for name in self._borrowed if _layer_of(name) == layer]:
            del self._borrowed[name]
        self._take_layer(self._model.model.layers, layer)

    def _is_lent(self, owner: str, wanted: frozenset[str]) -> bool:
        """Whether the weight of this module is lent: it stays in the mapped file until its layer is taken."""
        return (
            self._take_layer is not None
            and self._placement.device.type == "cpu"
            and _layer_of(owner) is not None
            and wanted == {"weight"}
            and isinstance(self._model.get_submodule(owner), nn.Linear)
            and not self._is_quantized_here(owner)
        )

    def _split(self, name: str) -> tuple[str, str]:
        """The module that a tensor belongs to, and the tensor's name in it, which may contain dots."""
        owner, _, part = name.rpartition(".")
        while owner and owner not in self._known:
            owner, _, more = owner.rpartition(".")
            part = f"{more}.{part}"
        return owner, part

    def _stored(self, owner: str) -> Quantization:
        """The precision that a layer is stored in. Quantized checkpoints leave some layers in 16 bits."""
        for quantization, scale in STORED_SCALE.items():
            if f"{owner}.{scale}" in self._names:
                return quantization
        return "none"

    def _wanted(self, owner: str) -> frozenset[str]:
        """The names of the tensors that a module needs, without the module's own name."""
        return stored_names(
            self._stored(owner),
            bias=getattr(self._missing[owner], "bias", None) is not None,
            nested=f"{owner}.weight.nested_absmax" in self._names,
        )

    def _place(self, owner: str, module: nn.Module, parts: dict[str, Tensor]) -> None:
        assert isinstance(module.weight, Tensor)
        expected = tuple(module.weight.shape)
        if not isinstance(module, nn.Linear):
            if self._has_shape(f"{owner}.weight", tuple(parts["weight"].shape), expected):
                module.weight = nn.Parameter(parts["weight"].to(self._placement.dtype), requires_grad=False)
            return
        layer = self._layer(owner, parts)
        if not self._has_shape(f"{owner}.weight", stored_shape(layer), expected):
            return
        if "bias" not in parts or self._has_shape(f"{owner}.bias", tuple(parts["bias"].shape), expected[:1]):
            self._model.set_submodule(owner, layer)

    def _has_shape(self, name: str, stored: tuple[int, ...], required: tuple[int, ...]) -> bool:
        """Whether the two shapes are the same. A difference is recorded for `check_complete`."""
        if stored != required:
            self._wrong_shapes[name] = (
                f"the checkpoint has {list(stored)}, config.json requires {list(required)}"
            )
        return stored == required

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
        """Whether this layer is quantized at load: linear layers of the decoder are, unless the checkpoint is
        quantized already. Then the layers that it leaves in 16 bits stay so."""
        layer = owner.startswith("model.layers.") and isinstance(self._model.get_submodule(owner), nn.Linear)
        return layer and self._placement.quantization != "none" and not self._comes_quantized


def _layer_of(name: str) -> int | None:
    """The index of the decoder layer that a module or tensor belongs to."""
    found = _IN_LAYER.match(name)
    return None if found is None else int(found[1])
