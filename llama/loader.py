"""From a folder to a model in memory.

Knows checkpoints, precision and devices; knows nothing of requests. Safetensors only, and no code
from a checkpoint is ever run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from llama.errors import BadCheckpoint, BadConfig, BadSettings, BadTokenizer, WeightsError
from llama.settings import Settings

_PADDING_ROWS = 1024  # a checkpoint may pad its token table by up to this many


def load_config(folder: Path) -> LlamaConfig:
    """The checked `config.json` of a folder. Raises BadConfig."""
    path = folder / "config.json"
    raw = _read_object(path)
    architectures = raw.get("architectures") or ["LlamaForCausalLM"]
    if raw.get("model_type") != "llama" or architectures != ["LlamaForCausalLM"]:
        raise BadConfig(
            f"{path} describes {raw.get('model_type')!r} and {architectures!r}; use a LlamaForCausalLM"
        )
    if "quantization_config" in raw:
        raise BadConfig(f"{path} says that the weights are quantized, which is not served; use plain weights")
    try:
        config = LlamaConfig.from_dict(raw)
    # a field of the wrong type surfaces as whatever the configuration class meets first
    except Exception as error:
        raise BadConfig(f"{path} is not a Llama configuration ({error}); copy it again") from error
    assert isinstance(config, LlamaConfig)
    _check_shape(config, path)
    return config


def eos_token_ids(folder: Path, config: LlamaConfig) -> set[int]:
    """The ids that end an answer, from `generation_config.json` or else `config.json`."""
    path = folder / "generation_config.json"
    named = _read_object(path).get("eos_token_id") if path.is_file() else None
    named = config.eos_token_id if named is None else named
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(isinstance(i, int) and 0 <= i < config.vocab_size for i in ids):
        raise BadConfig(f"{path} has no token ids of this model as eos_token_id; copy it again")
    return set(ids)


def check_tokenizer(config: LlamaConfig, size: int, folder: Path) -> None:
    """Raises BadTokenizer when a tokenizer of `size` ids cannot belong to the model."""
    rows = config.vocab_size
    if not rows - _PADDING_ROWS < size <= rows:
        raise BadTokenizer(
            f"the tokenizer in {folder} has {size} tokens and config.json says {rows}; "
            "copy the tokenizer files that belong to this model"
        )


def pick_device(settings: Settings) -> torch.device:
    """Raises BadSettings for a device that is not there."""
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadSettings(
            f"LLAMA_DEVICE is {name!r} and torch cannot use it; set it to cpu, cuda:0 or auto"
        ) from error


def pick_dtype(settings: Settings, device: torch.device, config: LlamaConfig) -> torch.dtype:
    """What weights are held in. `auto`: bfloat16 on GPUs that compute in it, float16 on older ones; on a
    CPU, where arithmetic is float32 in any case, 16 bits where the checkpoint has no more."""
    if settings.dtype != "auto":
        dtype = getattr(torch, settings.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type != "cuda":
        return config.dtype if config.dtype in (torch.bfloat16, torch.float16) else torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """The model on its device, in evaluation mode. Raises BadCheckpoint naming the file at fault."""
    _check_files(folder)
    disable_progress_bar()
    try:
        model, info = LlamaForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to be told which, below
        )
    except KeyError as error:  # an activation or a rope scaling that transformers does not know
        raise BadConfig(f"{folder / 'config.json'} names an unknown {error}; copy it again") from error
    except (OSError, RuntimeError, ValueError, ImportError, SafetensorError) as error:
        raise BadCheckpoint(
            f"{folder} does not load ({type(error).__name__}: {error}); copy it again"
        ) from error
    # Rotary tables of old checkpoints are the only tensors that may be left over.
    unexpected = [name for name in info["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq")]
    for problem, names in (
        ("lacks {} tensors that config.json implies", info["missing_keys"]),
        ("has {} tensors of another shape than config.json implies", [k[0] for k in info["mismatched_keys"]]),
        ("has {} tensors that config.json does not imply", unexpected),
    ):
        if names:
            raise BadCheckpoint(
                f"the checkpoint in {folder} {problem.format(len(names))}, {min(names)} among them; "
                "copy the files that belong together"
            )
    model.requires_grad_(False)
    return model.eval()


def _read_object(path: Path, kind: type[WeightsError] = BadConfig) -> dict[str, Any]:
    """A JSON object. Raises `kind`."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise kind(f"{path} is not there; copy the whole folder of the model") from error
    except (OSError, ValueError) as error:
        raise kind(f"{path} cannot be read ({type(error).__name__}); copy it again") from error
    if not isinstance(raw, dict):
        raise kind(f"{path} holds no JSON object; copy it again")
    return raw


def _check_shape(config: LlamaConfig, path: Path) -> None:
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in (*sizes, "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"):
        size = getattr(config, name)
        if not isinstance(size, int) or size < 1:
            raise BadConfig(f"{path} has {size!r} as {name}; copy it again")
    if config.num_attention_heads % config.num_key_value_heads:
        raise BadConfig(f"{path} has {config.num_key_value_heads} KV heads for {config.num_attention_heads}")


def _check_files(folder: Path) -> None:
    """Every safetensors file that the folder names is there and whole."""
    index = folder / "model.safetensors.index.json"
    weight_map = (
        _read_object(index, BadCheckpoint).get("weight_map") if index.is_file() else {"": "model.safetensors"}
    )
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadCheckpoint(f"{index} names no files; copy it again")
    for name in sorted(set(weight_map.values())):
        path = folder / name
        if not path.is_file():
            raise BadCheckpoint(
                f"{path} is not there; copy the model's safetensors files (no other kind is read)"
            )
        try:
            # Reads the header alone; it says how long the file must be.
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise BadCheckpoint(f"{path} is damaged or cut short ({error}); copy it again") from error
