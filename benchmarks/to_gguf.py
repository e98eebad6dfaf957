"""Convert a small Llama, such as the workload's model, to a GGUF file for llama.cpp.

Knows llama.cpp's tensor names and its order of rotary channels; knows nothing about speed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from safetensors.torch import load_file

_FILE_TYPE = {Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16, Kind.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0}


def write_gguf(folder: Path, path: Path, kind: Kind) -> None:
    """Write the file under a temporary name, and then rename it to `path`. Do nothing if `path` exists."""
    if path.is_file():
        return
    config = json.loads((folder / "config.json").read_text())
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    _describe(writer, config)
    writer.add_file_type(_FILE_TYPE[kind])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        values = tensor.float().numpy()
        if stem.endswith("q_proj"):
            values = _in_pairs(values, config["num_attention_heads"])
        elif stem.endswith("k_proj"):
            values = _in_pairs(values, config["num_key_value_heads"])
        stored = Kind.F32 if values.ndim == 1 else kind
        writer.add_tensor(
            f"{names.get_name(stem)}.weight", gguf.quants.quantize(values, stored), raw_dtype=stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads, vocabulary = config["num_attention_heads"], config["vocab_size"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}".encode() for i in range(vocabulary)])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([gguf.TokenType.NORMAL] * vocabulary)


def _in_pairs(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the output channels of a projection.

    llama.cpp rotates pairs of neighbouring channels; transformers pairs each channel with one of the other
    half.
    """
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
