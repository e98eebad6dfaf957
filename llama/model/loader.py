"""From a folder to a model in memory.

Knows what a configuration implies, precision and devices; knows nothing of requests. No code from a
checkpoint is ever run. transformers' own loader maps all files at once, and cannot make FP8 layers
without a hub.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama.errors import BadCheckpoint, BadConfig, BadSettings, BadTokenizer, DoesNotFit
from llama.model.assembly import Filling
from llama.model.checkpoint import EMBEDDINGS, HEAD, Checkpoint
from llama.model.plan import Gpu, pick
from llama.model.quantization import Quantization, configured
from llama.settings import Settings
from llama.weights.file_checks import named_ends, read_object
from llama.weights.progress import LogProgress

if TYPE_CHECKING:
    from llama.text.tokenizer import Tokenizer

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
    """The ids that end an answer, from `generation_config.json` or else `config.json`."""
    path, named = next(named_ends(folder), (folder / "config.json", config.eos_token_id))
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise BadConfig(
            f"{path} has {named!r} as eos_token_id, which is not a token id or a list of them; copy it again"
        )
    return set(ids)


def fit_tokenizer(tokenizer: Tokenizer, config: LlamaConfig, folder: Path) -> None:
    """Restrict a tokenizer to the ids that the model's table has. The table may be padded with rows that are
    no tokens, and a few control tokens may lie outside of it.

    Raises BadTokenizer when the tokenizer cannot belong to the model.
    """
    rows = config.vocab_size
    if tokenizer.text_size > rows:
        raise BadTokenizer(
            f"the tokenizer in {folder} has {tokenizer.text_size} tokens and the vocab_size of config.json "
            f"is {rows}; copy the tokenizer files that belong to this model"
        )
    if 2 * tokenizer.size < rows:
        logger.warning(
            "the tokenizer in %s has %d tokens and the vocab_size of config.json is %d: is it this model's?",
            folder,
            tokenizer.size,
            rows,
        )
    tokenizer.restrict(rows)


def pick_device(settings: Settings) -> torch.device:
    """Raises BadSettings for a device that is not there."""
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError(f"{name} is no GPU that is served")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadSettings(
            f"LLAMA_DEVICE is {name!r} and torch cannot use it; set it to cpu, cuda:0 or auto"
        ) from error


def pick_dtype(settings: Settings, config: LlamaConfig, capability: tuple[int, int] | None) -> torch.dtype:
    """What weights are held in. `auto`: bfloat16 on GPUs that compute in it, float16 on older ones; on a
    CPU, which has no `capability`, 16 bits where the checkpoint has no more, whatever it then computes in
    (`arithmetic_dtype`)."""
    if settings.dtype != "auto":
        dtype = getattr(torch, settings.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if capability is None:
        return config.dtype if config.dtype in (torch.bfloat16, torch.float16) else torch.float32
    return torch.bfloat16 if capability >= (8, 0) else torch.float16


def longest_context(config: LlamaConfig) -> int:
    """The most tokens that a model's positions allow, as vLLM derives it: linear and dynamic scaling stretch
    the positions that it was trained on, all other kinds have `max_position_embeddings` stretched already."""
    scaling = config.rope_parameters
    factor = scaling["factor"] if scaling["rope_type"] in _STRETCHED else 1.0
    return int(config.max_position_embeddings * factor)


def context_wanted(settings: Settings, config: LlamaConfig) -> int:
    """Tokens of prompt and answer together: the model's own most, or fewer."""
    most = longest_context(config)
    return min(settings.max_context or most, most)


def stored_quantization(config: LlamaConfig) -> Quantization:
    """What the checkpoint's linear layers are stored in. Raises BadConfig for what is not read here."""
    raw = getattr(config, "quantization_config", None)
    if not raw:
        return "none"
    if (stored := configured(raw)) is None:
        raise BadConfig(
            "config.json says that the weights are quantized in a way that only vLLM may read (AWQ, GPTQ and "
            "others; `plan` cannot tell what they take); set LLAMA_ENGINE to vllm, or use plain weights, "
            "bitsandbytes' int8 or NF4, or FP8 by rows (fbgemm_fp8)"
        )
    return stored


def pick_quantization(settings: Settings, device: torch.device, config: LlamaConfig) -> Quantization:
    """What the linear layers are to be held in. `auto`: as they are stored on a CPU, and on a GPU what
    leaves room for several requests. Raises BadSettings, BadConfig or DoesNotFit."""
    stored, wanted = stored_quantization(config), settings.quantization
    if stored != "none" and wanted not in ("auto", stored):
        raise BadSettings(
            f"LLAMA_QUANTIZATION is {wanted} and the checkpoint is stored in {stored}; unset it"
        )
    if device.type == "cpu":
        return stored if wanted == "auto" else wanted
    gpu = gpu_of(device)
    return pick(
        config,
        [gpu],
        wanted,
        context=context_wanted(settings, config),
        stored=stored,
        dtype=pick_dtype(settings, config, gpu.capability),
    )


def gpu_of(device: torch.device) -> Gpu:
    """The card and what is free on it."""
    free, _ = torch.cuda.mem_get_info(device)
    major, minor = torch.cuda.get_device_capability(device)
    return Gpu(torch.cuda.get_device_name(device), free, (major, minor))


def arithmetic_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a model held in `dtype` computes in: the same on a GPU, and float32 on a CPU, unless it has
    bfloat16 arithmetic that is not slower."""
    if device.type != "cpu" or (dtype is torch.bfloat16 and has_quick_bfloat16()):
        return dtype
    return torch.float32


def has_quick_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices faster than others: with matrix units, or with
    AVX512-BF16 on AMD's. One layer of the benchmark at 32 rows takes, in ms, oneDNN in bfloat16 and FBGEMM:
    0.4 and 1.4 on a Xeon with AMX, 2.1 and 1.4 there without it, 1.1 and 2.2 on an EPYC."""
    can = torch.cpu.get_capabilities()
    amd = str(can.get("cpu_name")).startswith("AMD")
    return bool(torch._C._has_mkldnn and (has_matrix_units() or (amd and can.get("avx512_bf16"))))


def has_matrix_units() -> bool:
    """AMX, for bfloat16."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def empty_model(config: LlamaConfig, device: torch.device) -> LlamaForCausalLM:
    """The modules of a model, their parameters without memory; what is computed from `config` alone is
    there, on `device`."""
    plain = copy.copy(config)
    plain.pad_token_id = None  # nothing is padded here, and it may lie outside of the table
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        model = LlamaForCausalLM(plain)
    with device:
        model.model.rotary_emb = LlamaRotaryEmbedding(plain)
    return model.requires_grad_(False).eval()


def load_model(
    folder: Path, config: LlamaConfig, dtype: torch.dtype, device: torch.device, quantization: Quantization
) -> LlamaForCausalLM:
    """The model on its device, layer by layer: what is not yet there is never in memory twice.

    Linear layers of the decoder are held in `quantization`, all else in `dtype`. Raises BadCheckpoint
    naming the file or tensor at fault.
    """
    checkpoint = Checkpoint(folder)
    # Tied, and stored under the other name.
    renamed = {HEAD: EMBEDDINGS} if config.tie_word_embeddings and checkpoint.has_only_the_head else {}
    if config.tie_word_embeddings and checkpoint.has_head_of_its_own:
        logger.warning(
            "config.json ties the output layer to the embeddings, but the checkpoint stores another one, "
            "which is used"
        )
        config = copy.copy(config)
        config.tie_word_embeddings = False
    try:
        model = empty_model(config, device)
    except Exception as error:  # fields that only transformers knows, such as a kind of attention
        raise BadConfig(
            f"config.json in {folder} describes no model that transformers can make ({type(error).__name__}: "
            f"{error}); copy it again"
        ) from error
    filling = Filling(model, checkpoint.names, dtype, arithmetic_dtype(dtype, device), device, quantization)
    name, done, progress = "", 0, LogProgress(checkpoint.size, 0)
    try:
        for path in checkpoint.files:
            for name, tensor in checkpoint.tensors(path):
                filling.add(renamed.get(name, name), tensor)
                done += tensor.nbytes
                progress.show(done)
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            f"{folder} does not fit {device} in {quantization} ({error}); "
            "`python -m llama plan` shows what would"
        ) from error
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:  # bitsandbytes' own checks
        raise BadCheckpoint(
            f"{name} in {folder} cannot be used ({error}); if the file is sound, this device cannot do it: "
            "try other values of LLAMA_QUANTIZATION and LLAMA_DEVICE"
        ) from error
    filling.check_complete(folder)
    model.tie_weights()
    return model


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
