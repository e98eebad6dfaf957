"""The model and the prompts that every peer gets.

The model is a random Llama with 134 million parameters: speed depends on shapes, not on the values of the
weights. Knows files and token ids; knows nothing about peers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from llama import ROOT

OUT = ROOT / "benchmarks" / "out"
"""The folder of generated models, logs and unfinished results, which git ignores."""
VOCABULARY = 32000
CONTEXT = 4096
PROMPT_TOKENS = 128
NEW_TOKENS = 64

_FIRST_WORD = 3 + 256  # ids below this are control tokens and bytes


def prompt(tokens: int, seed: int) -> list[int]:
    """Return random token ids. Prompts of different seeds have no common prefix beyond BOS."""
    rng = random.Random(seed)
    return [1, *(rng.randrange(_FIRST_WORD, VOCABULARY) for _ in range(tokens - 1))]


def as_text(token_ids: list[int]) -> str:
    """Return the text that the workload's tokenizer encodes as these ids. The first one must be BOS."""
    return " ".join(_word(token_id) for token_id in token_ids[1:])


def write_model(folder: Path) -> None:
    """Write the model in bfloat16 and in Hugging Face format. Do nothing if `folder` exists.

    It is written under a temporary name and then renamed.
    """
    if folder.is_dir():
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    part = folder.with_suffix(".part")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(part)
    (part / "tokenizer.model").write_bytes(tokenizer_model())
    _write_fast_tokenizer(part)
    part.rename(folder)


def write_large(folder: Path, layers: int) -> None:
    """Write a checkpoint of several files, with about 0.1 GB per layer, to measure loading.

    All layers are the same. Do nothing if `folder` exists.
    """
    if folder.is_dir():
        return
    import torch
    from huggingface_hub import save_torch_state_dict
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    tensors = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    first = "model.layers.0."
    for index in range(1, layers):
        for name in [name for name in tensors if name.startswith(first)]:
            tensors[name.replace(first, f"model.layers.{index}.")] = tensors[name].clone()
    config.num_hidden_layers = layers
    config.architectures = ["LlamaForCausalLM"]
    part = folder.with_suffix(".part")
    part.mkdir(exist_ok=True)
    save_torch_state_dict(tensors, part, max_shard_size="1GB")
    config.save_pretrained(part)
    (part / "tokenizer.model").write_bytes(tokenizer_model())
    part.rename(folder)


def _word(token_id: int) -> str:
    return f"t{token_id:05}"


def _pieces() -> Iterator[tuple[str, str]]:
    """Yield each token and its type, in the order of ids."""
    yield from (("<unk>", "UNKNOWN"), ("<s>", "CONTROL"), ("</s>", "CONTROL"))
    for byte in range(256):
        yield f"<0x{byte:02X}>", "BYTE"
    for token_id in range(_FIRST_WORD, VOCABULARY):
        yield f"▁{_word(token_id)}", "USER_DEFINED"


def _write_fast_tokenizer(folder: Path) -> None:
    """Write the tokenizer as `tokenizer.json`, for peers.

    transformers would read `tokenizer.model` as a tokenizer that merges characters.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = {piece: index for index, (piece, _) in enumerate(_pieces())}
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))


def tokenizer_model() -> bytes:
    """Return a SentencePiece model with Llama 2's layout. Its tokens are control tokens, bytes and words."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto()
    for piece, kind in _pieces():
        proto.pieces.add(piece=piece, type=ModelProto.SentencePiece.Type.Value(kind))
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = VOCABULARY
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    return bytes(proto.SerializeToString())
