"""Make models with random weights: in memory, with their placement and cache, or as a packed folder.

Speed depends on shapes, not on the values of the weights. Knows layers and files; knows nothing about what is
measured.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.results import Skipped
from benchmarks.workload import VOCABULARY, tokenizer_model
from llama.errors import DoesNotFit
from llama.model.loader import empty_model
from llama.model.placement import Placement, place
from llama.model.quantized_layers import Quantization, quantize, to_config, to_stored
from llama.settings import Settings
from llama.weights.file_checks import INDEX

_LATER_LAYER = re.compile(r"model\.layers\.[1-9]")

# A small model with grouped-query attention, for the checks, and to test this program without a GPU.
SMALL = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=896,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
    initializer_range=0.2,
    dtype="bfloat16",
)


def placement_of(
    config: LlamaConfig, device: torch.device, quantization: Quantization, dtype: str, context: int
) -> Placement:
    """Return the placement that the engine would choose.

    Raises Skipped if the device cannot hold the model or cannot compute in this precision.
    """
    settings = Settings.model_validate(
        {"device": str(device), "quantization": quantization, "dtype": dtype, "max_context": context}
    )
    try:
        return place(settings, config)
    except DoesNotFit as error:
        raise Skipped(error.message) from error


def random_model(
    config: LlamaConfig,
    quantization: Quantization,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> LlamaForCausalLM:
    """Return a model with random weights. Each layer is quantized before the next one is made."""
    model = empty_model(config, device)
    for name, module in list(model.named_modules()):
        if not module._parameters:
            continue
        weight = _random(module, device).to(dtype)
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, quantize(weight, None, quantization, dtype))
        else:
            module.weight = nn.Parameter(weight, requires_grad=False)
    return model


def write_packed(config: LlamaConfig, quantization: Quantization, folder: Path, device: torch.device) -> None:
    """Write a folder in the format of `weights pack`, with one file per layer. All layers are the same."""
    folder.mkdir(parents=True)
    model = empty_model(config, device)
    stored: dict[str, dict[str, Tensor]] = {"layer": {}, "rest": {}}
    for name, module in model.named_modules():
        if not module._parameters or _LATER_LAYER.match(name):
            continue
        weight = _random(module, device)
        layer = name.removeprefix("model.layers.0.")
        if layer == name:
            stored["rest"][f"{name}.weight"] = weight.cpu()
        elif isinstance(module, nn.Linear):
            parts = to_stored(quantize(weight, None, quantization, torch.bfloat16))
            stored["layer"] |= {f"{layer}.{part}": tensor.cpu() for part, tensor in parts.items()}
        else:
            stored["layer"][f"{layer}.weight"] = weight.cpu()
    weight_map: dict[str, str] = {}
    for index in range(config.num_hidden_layers):
        tensors = {f"model.layers.{index}.{name}": tensor for name, tensor in stored["layer"].items()}
        weight_map |= _save(tensors, folder / f"model-{index:05}.safetensors")
    weight_map |= _save(stored["rest"], folder / "model-rest.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    described = {
        **config.to_dict(),
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": to_config(quantization),
    }
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(tokenizer_model())


def _random(module: nn.Module, device: torch.device) -> Tensor:
    assert isinstance(module.weight, Tensor)
    if hasattr(module, "variance_epsilon"):
        return torch.ones(module.weight.shape, dtype=torch.bfloat16, device=device)
    return torch.randn(module.weight.shape, dtype=torch.bfloat16, device=device).mul_(0.02)


def _save(tensors: dict[str, Tensor], path: Path) -> dict[str, str]:
    save_file(tensors, path, metadata={"format": "pt"})
    return dict.fromkeys(tensors, path.name)
