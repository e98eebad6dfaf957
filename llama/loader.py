"""From a folder to a model in memory.

Knows checkpoints, precision and devices; knows nothing of requests. Safetensors only, and no code
from a checkpoint is ever run.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from llama.errors import BadCheckpoint, BadConfig, BadSettings, BadTokenizer
from llama.settings import Settings

_PADDING_ROWS = 1024  # a checkpoint may pad its token table by up to this many


def load_config(folder: Path) -> LlamaConfig:
    """The checked `config.json` of a folder. Raises BadConfig."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadConfig(f"{path} is not there; copy the whole folder of the model") from error
    except (OSError, ValueError) as error:
        raise BadConfig(f"{path} cannot be read ({type(error).__name__}); copy it again") from error
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    architectures = (raw.get("architectures") or ["LlamaForCausalLM"]) if isinstance(raw, dict) else []
    if kind != "llama" or "LlamaForCausalLM" not in architectures:
        raise BadConfig(f"{path} describes a {kind!r} model; only LlamaForCausalLM is served, use a Llama")
    try:
        config = LlamaConfig.from_dict(raw)
    # a field of the wrong type surfaces as whatever the configuration class meets first
    except Exception as error:
        raise BadConfig(f"{path} is not a Llama configuration ({error}); copy it again") from error
    assert isinstance(config, LlamaConfig)
    return config


def eos_token_ids(folder: Path, config: LlamaConfig) -> list[int]:
    """The ids that end an answer, from `generation_config.json` or else `config.json`."""
    path = folder / "generation_config.json"
    try:
        if path.is_file():
            generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        else:
            generation = GenerationConfig.from_model_config(config)
    except (OSError, ValueError) as error:
        raise BadConfig(f"{path} cannot be read ({type(error).__name__}); copy it again") from error
    ids = generation.eos_token_id
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


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


def pick_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on GPUs that compute in it, float16 on older ones, float32 on a CPU, where
    16-bit products are quick on the newest kinds only."""
    if settings.dtype != "auto":
        dtype = getattr(torch, settings.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type != "cuda":
        return torch.float32
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
        )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise BadCheckpoint(
            f"{folder} does not load ({type(error).__name__}: {error}); copy it again"
        ) from error
    # Rotary tables of old checkpoints are the only tensors that may be left over.
    unexpected = [name for name in info["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq")]
    for problem, names in (
        ("lacks", info["missing_keys"]),
        ("has the wrong shape for", [key[0] for key in info["mismatched_keys"]]),
        ("has no place for", unexpected),
    ):
        if names:
            raise BadCheckpoint(
                f"the checkpoint in {folder} {problem} {len(names)} of the tensors that config.json implies, "
                f"{sorted(names)[0]} among them; copy the files that belong together"
            )
    model.requires_grad_(False)
    return model.eval()


def _check_files(folder: Path) -> None:
    """Every safetensors file that the folder names is there and whole."""
    index = folder / "model.safetensors.index.json"
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except FileNotFoundError:
        names = ["model.safetensors"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BadCheckpoint(f"{index} cannot be read ({type(error).__name__}); copy it again") from error
    for name in names:
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
