"""`config.json`: read, checked, and asked what it implies.

Knows the fields of a Llama configuration; knows nothing of settings, tensors or devices.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama.errors import BadConfig
from llama.weights.file_checks import named_ends, read_object

_STRETCHED = ("linear", "dynamic")
_TYPES: dict[str, type] = {
    "architectures": list,
    "dtype": str,
    "torch_dtype": str,
    "rope_parameters": dict,
    "rope_scaling": dict,
    "quantization_config": dict,
}
_JSON: dict[type, str] = {list: "a list", str: "a string", dict: "an object"}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


def load_config(folder: Path) -> LlamaConfig:
    """The checked `config.json` of a folder. Raises BadConfig."""
    path = folder / "config.json"
    raw = read_object(path)
    for name, kind in _TYPES.items():
        if not isinstance(raw.get(name), kind | None):
            raise BadConfig(f"{path} has {raw[name]!r} as {name}, which is not {_JSON[kind]}; copy it again")
    architectures = raw.get("architectures") or ["LlamaForCausalLM"]
    if raw.get("model_type") != "llama" or architectures != ["LlamaForCausalLM"]:
        raise BadConfig(
            f"{path} describes {raw.get('model_type')!r} and {architectures!r}; use a LlamaForCausalLM"
        )
    for name in ("load_in_8bit", "load_in_4bit"):
        if not isinstance((raw.get("quantization_config") or {}).get(name, False), bool):
            raise BadConfig(f"{path} has no true or false as {name} in quantization_config; copy it again")
    for name in _SIZES:
        if raw.get(name) is not None:
            _check_size(raw[name], name, path)
    try:
        config = LlamaConfig.from_dict(raw)
    # a field of the wrong type surfaces as whatever the configuration class meets first
    except Exception as error:
        raise BadConfig(f"{path} is not a Llama configuration ({error}); copy it again") from error
    assert isinstance(config, LlamaConfig)
    _check_shape(config, path)
    _check_layers(config, path)
    return config


def eos_token_ids(folder: Path, config: LlamaConfig) -> set[int]:
    """The ids that end an answer, from `generation_config.json`, otherwise from `config.json`."""
    path, named = next(named_ends(folder), (folder / "config.json", config.eos_token_id))
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise BadConfig(
            f"{path} has {named!r} as eos_token_id, which is not a token id or a list of them; copy it again"
        )
    return set(ids)


def longest_context(config: LlamaConfig) -> int:
    """The most tokens that a model's positions allow, as vLLM derives it: linear and dynamic scaling stretch
    the positions that it was trained on, all other kinds have `max_position_embeddings` stretched already."""
    scaling = config.rope_parameters
    factor = scaling["factor"] if scaling["rope_type"] in _STRETCHED else 1.0
    return int(config.max_position_embeddings * factor)


def context_length(config: LlamaConfig, limit: int | None) -> int:
    """Tokens of prompt and answer together: the most that the model allows, or `limit` if that is less."""
    most = longest_context(config)
    return min(limit or most, most)


def _check_size(size: object, name: str, path: Path) -> None:
    if type(size) is not int or size < 1:
        raise BadConfig(f"{path} has {size!r} as {name}, which is not a positive whole number; copy it again")


def _check_shape(config: LlamaConfig, path: Path) -> None:
    for name in _SIZES:
        _check_size(getattr(config, name), name, path)
    if config.num_attention_heads % config.num_key_value_heads:
        raise BadConfig(
            f"{path} has {config.num_key_value_heads} as num_key_value_heads, which does not divide "
            f"num_attention_heads ({config.num_attention_heads}); copy it again"
        )


def _check_layers(config: LlamaConfig, path: Path) -> None:
    """Whether layers of this kind can be computed: a value of the wrong type shows when it is used."""
    eps = config.rms_norm_eps
    if not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise BadConfig(f"{path} has {eps!r} as rms_norm_eps, which is not from 0 to below 1; copy it again")
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if not isinstance(getattr(config, name), bool):
            raise BadConfig(f"{path} has {getattr(config, name)!r} as {name}; set it to true or false")
    try:
        activation = ACT2FN[config.hidden_act]
        activation(torch.zeros(1))
    except Exception as error:
        raise BadConfig(
            f"{path} has {config.hidden_act!r} as hidden_act, which is unknown; copy it again"
        ) from error
    try:
        if any(isinstance(value, bool) for value in config.rope_parameters.values()):
            raise TypeError("true and false are no numbers")
        last = longest_context(config) - 1
        cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor([[0, last]]))
        sound = cos.shape[-1] == config.head_dim and bool((cos + sin).isfinite().all())
    # what transformers meets first in a table of the wrong types or numbers, and in a kind that is unknown
    except Exception as error:
        raise BadConfig(
            f"{path} has {config.rope_parameters!r} as rope_parameters, which cannot be used "
            f"({type(error).__name__}: {error}); copy it again"
        ) from error
    if not sound or last < 0:
        raise BadConfig(
            f"{path} has {config.rope_parameters!r} as rope_parameters, which give no valid positions; "
            "copy it again"
        )
