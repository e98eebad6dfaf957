"""Reads and checks `config.json`, and derives the context length and the end tokens from it.

Knows the fields of a Llama configuration; knows nothing about settings, weights or devices.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama.errors import BadConfig
from llama.weights.file_checks import named_ends, read_object

logger = logging.getLogger(__name__)

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
    """Read and check the `config.json` of a folder. Raises BadConfig."""
    path = folder / "config.json"
    raw = read_object(path)
    for name, kind in _TYPES.items():
        if not isinstance(raw.get(name), kind | None):
            raise BadConfig(
                f"{path} has {raw[name]!r} as {name}, which is not {_JSON[kind]}; copy the file again"
            )
    architectures = raw.get("architectures") or ["LlamaForCausalLM"]
    if raw.get("model_type") != "llama" or architectures != ["LlamaForCausalLM"]:
        raise BadConfig(
            f"{path} has {raw.get('model_type')!r} as model_type and {architectures!r} as architectures; "
            "use a model of type 'llama' with the architecture LlamaForCausalLM"
        )
    for name in ("load_in_8bit", "load_in_4bit"):
        if not isinstance((raw.get("quantization_config") or {}).get(name, False), bool):
            raise BadConfig(
                f"{path} has a {name} in quantization_config that is neither true nor false; "
                "copy the file again"
            )
    for name in _SIZES:
        if raw.get(name) is not None:
            _check_size(raw[name], name, path)
    try:
        config = LlamaConfig.from_dict(raw)
    # The configuration class raises errors of many types for a field that has the wrong type.
    except Exception as error:
        raise BadConfig(
            f"{path} is not a valid Llama configuration ({error}); copy the file again"
        ) from error
    assert isinstance(config, LlamaConfig)
    _check_shape(config, path)
    _check_layers(config, path)
    return config


def eos_token_ids(folder: Path, config: LlamaConfig) -> set[int]:
    """The token ids that end an answer, from `generation_config.json` if it has them, else `config.json`."""
    path, named = next(named_ends(folder), (folder / "config.json", config.eos_token_id))
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise BadConfig(
            f"{path} has {named!r} as eos_token_id, which is neither a token id nor a list of token ids; "
            "copy the file again"
        )
    return set(ids)


def longest_context(config: LlamaConfig) -> int:
    """The maximum number of tokens that a model's positions allow, calculated as in vLLM.

    For linear and dynamic scaling, `max_position_embeddings` is the length before scaling. For every other
    kind, it is the length after scaling.
    """
    scaling = config.rope_parameters
    factor = scaling["factor"] if scaling["rope_type"] in _STRETCHED else 1.0
    return int(config.max_position_embeddings * factor)


def context_length(config: LlamaConfig, limit: int | None) -> int:
    """The maximum number of tokens of prompt and answer together: the model's own, or `limit` if smaller."""
    most = longest_context(config)
    if limit is not None and limit > most:
        logger.warning("LLAMA_MAX_CONTEXT is %d and is lowered to %d, the model's own limit", limit, most)
    return min(limit or most, most)


def _check_size(size: object, name: str, path: Path) -> None:
    if type(size) is not int or size < 1:
        raise BadConfig(
            f"{path} has {size!r} as {name}, which is not a positive integer; copy the file again"
        )


def _check_shape(config: LlamaConfig, path: Path) -> None:
    for name in _SIZES:
        _check_size(getattr(config, name), name, path)
    if config.num_attention_heads % config.num_key_value_heads:
        raise BadConfig(
            f"{path} has {config.num_key_value_heads} as num_key_value_heads, which does not divide "
            f"num_attention_heads ({config.num_attention_heads}); copy the file again"
        )


def _check_layers(config: LlamaConfig, path: Path) -> None:
    """Check the values that layers compute with. LlamaConfig accepts wrong types, so use each value once."""
    eps = config.rms_norm_eps
    if not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise BadConfig(
            f"{path} has {eps!r} as rms_norm_eps, which is not a number of at least 0 and below 1; "
            "copy the file again"
        )
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if not isinstance(getattr(config, name), bool):
            raise BadConfig(f"{path} has {getattr(config, name)!r} as {name}; set it to true or false")
    try:
        activation = ACT2FN[config.hidden_act]
        activation(torch.zeros(1))
    except Exception as error:
        raise BadConfig(
            f"{path} has {config.hidden_act!r} as hidden_act, which is not a known activation; "
            "copy the file again"
        ) from error
    try:
        if any(isinstance(value, bool) for value in config.rope_parameters.values()):
            raise TypeError("true and false are not numbers")
        last = longest_context(config) - 1
        cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor([[0, last]]))
        sound = cos.shape[-1] == config.head_dim and bool((cos + sin).isfinite().all())
    # transformers raises errors of many types for wrong types, wrong numbers and unknown kinds of scaling.
    except Exception as error:
        raise BadConfig(
            f"{path} has {config.rope_parameters!r} as rope_parameters, which cannot be used "
            f"({type(error).__name__}: {error}); copy the file again"
        ) from error
    if not sound or last < 0:
        raise BadConfig(
            f"{path} has {config.rope_parameters!r} as rope_parameters, which do not give valid positions; "
            "copy the file again"
        )
