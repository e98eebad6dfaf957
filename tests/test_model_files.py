"""Model folders with the variations that published models have, compared with transformers and vLLM."""

from __future__ import annotations

import codecs
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from small_models import LLAMA_2_TOKENIZER, VOCABULARY, copied, needs_llama_2_tokenizer, write_model
from tokenizer_files import CHATML, CHATML_WORDS, LLAMA_2, SPELLINGS, write_tokenizer
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama.errors import BadTokenizer, InvalidInput
from llama.generation import Llama
from llama.load import load_llama
from llama.model.config import context_length, load_config, longest_context
from llama.model.placement import Placement
from llama.prompt.dialog import Dialog
from llama.prompt.limits import PromptLimits
from llama.prompt.prompt_template import FormattedPrompt
from llama.sampling_params import SamplingParams
from llama.settings import Settings
from llama.text.llama2_tokenizer import Llama2Tokenizer
from llama.text.load_tokenizer import load_tokenizer
from llama.text.tokenizer import encode_within
from llama.torch_engine.engine import TorchEngine
from llama.torch_engine.layers import take_apart
from llama.weights.file_checks import without_byte_order_marks
from llama.weights.manifest import read_manifest


@pytest.fixture(scope="module")
def processor(sentencepiece_model: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(sentencepiece_model))


@contextmanager
def served(folder: Path, **settings: Any) -> Iterator[Llama]:
    llama = load_llama(Settings(weights=folder, dtype="float32", **{"cache_memory": "32MB", **settings}))
    try:
        yield llama
    finally:
        llama.close()


def tokens(llama: Llama, prompt: list[int], count: int, **params: Any) -> list[int]:
    """The `count` token ids of an answer that no end token ends."""
    sampling = SamplingParams(
        **{"temperature": 0.0, "max_new_tokens": count, "min_new_tokens": count, **params}
    )
    return [token for piece in llama._engine.submit(prompt, sampling) for token in piece]


def by_transformers(folder: Path, prompt: list[int], count: int) -> list[int]:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    result: list[int] = answer[0, len(prompt) :].tolist()
    return result


PROMPT = [1, *range(300, 340)]


# --- Llama 2's format without a tokenizer.model

TEXTS = st.text(st.one_of(st.sampled_from(" \n\tabcdehinorst▁<s>/[]0123é🦙中"), st.characters()), max_size=60)


@pytest.fixture(scope="module", params=SPELLINGS)
def json_only(
    request: pytest.FixtureRequest,
    processor: SentencePieceProcessor,
    tmp_path_factory: pytest.TempPathFactory,
) -> Llama2Tokenizer:
    folder = tmp_path_factory.mktemp("json-only")
    write_tokenizer(folder, processor, template=LLAMA_2, spelling=request.param)
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, Llama2Tokenizer)
    return tokenizer


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(text=TEXTS)
def test_a_tokenizer_json_alone_gives_the_ids_of_sentencepiece(
    json_only: Llama2Tokenizer, processor: SentencePieceProcessor, text: str
) -> None:
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert json_only.encode(FormattedPrompt((text,))) == [1, *processor.encode(text)]


@needs_llama_2_tokenizer
def test_llama_2s_tokenizer_saved_by_transformers_gives_the_same_ids(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(LLAMA_2_TOKENIZER / name, source)
    saved = tmp_path / "saved"
    AutoTokenizer.from_pretrained(source).save_pretrained(saved)
    assert not (saved / "tokenizer.model").exists()
    ours, reference = load_tokenizer(saved), load_tokenizer(LLAMA_2_TOKENIZER)
    texts = [f"{' ' * n}a{' ' * m}b" for n in range(20) for m in range(0, 40, 3)]
    texts += ["\n" * n + "\t" * n + "x" + " " * n for n in range(20)]
    texts += [(Path(__file__).read_text("utf-8"))[start : start + 500] for start in range(0, 6000, 500)]
    for text in texts:
        dialog = Dialog("", (text, "</s>", text))
        assert ours.encode(dialog) == reference.encode(dialog), text


def test_merges_may_be_written_as_one_string_as_in_old_files(
    processor: SentencePieceProcessor, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, processor)
    raw = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    text = "the answer is a number"
    assert load_tokenizer(tmp_path).encode(FormattedPrompt((text,))) == [1, *processor.encode(text)]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"model": {"type": "WordPiece", "vocab": {}}}',
        '{"model": {"vocab": 5}}',
        '{"model": {"byte_fallback": true, "vocab": {"": 0, "a": 1}, "merges": []}}',
        '{"model": {"byte_fallback": true, "vocab": {"<unk>": 0, "a": 1}, "merges": []}}',
        '{"model": {"byte_fallback": true, "vocab": {"<unk>": 0, "\\ud800": 1}, "merges": []}}',
        '{"model": {"byte_fallback": true, "vocab": {"<unk>": 0.0, "a": 1}, "merges": []}}',
        '{"model": {"byte_fallback": true, "vocab": {"<unk>": 0}, "merges": [["a", ["b"]]]}}',
        "[" * 200_000,
    ],
)
def test_an_invalid_tokenizer_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BadTokenizer, match=rf"^E3004 BadTokenizer: {tmp_path}"):
        load_tokenizer(tmp_path)


def test_a_piece_that_no_merge_produces_does_not_change_the_ids(
    processor: SentencePieceProcessor, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, processor)
    raw = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    raw["model"]["vocab"]["answe"] = VOCABULARY
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    text = "the answer is a number"
    assert load_tokenizer(tmp_path).encode(FormattedPrompt((text,))) == [1, *processor.encode(text)]


# --- an output layer that config.json ties to the embeddings but the checkpoint stores


def tied(source: Path, folder: Path, *, head: str) -> Path:
    """Tie the output layer to the embeddings in config.json. `head` says what the checkpoint stores: an output
    layer that differs ("other"), an equal one ("same"), none ("absent"), or one without embeddings ("only")."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    if head == "same":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    elif head == "absent":
        del tensors["lm_head.weight"]
    elif head == "only":
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("head", ["other", "same", "absent", "only"])
def test_a_stored_output_layer_is_used_as_transformers_uses_it(
    llama_folder: Path, tmp_path: Path, head: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tied(llama_folder, tmp_path / "tied", head=head)
    with served(folder) as llama:
        assert tokens(llama, PROMPT, 12) == by_transformers(folder, PROMPT, 12)
    assert any("stores a different output layer" in line for line in caplog.messages) == (head == "other")


# --- vocabularies and embedding tables of different sizes


@pytest.mark.parametrize("rows", [VOCABULARY, VOCABULARY + 3, VOCABULARY + 600])
def test_the_padding_of_an_embedding_table_is_never_sampled(
    llama_folder: Path, tmp_path: Path, rows: int
) -> None:
    folder = tmp_path / "padded"
    write_model(folder, vocab_size=rows)
    shutil.copy(llama_folder / "tokenizer.model", folder)
    with served(folder) as llama:
        answer = tokens(llama, PROMPT, 200, temperature=5.0, seed=1)
        assert max(answer) < VOCABULARY
        with pytest.raises(InvalidInput):
            tokens(llama, [1, VOCABULARY], 1)


def test_a_pad_token_outside_the_table_is_refused_only_in_a_prompt(
    processor: SentencePieceProcessor, llama_folder: Path, tmp_path: Path
) -> None:
    writes_pad = (
        "{% for m in messages %}{{ m['content'] }}{% if m['content'] == 'pad' %}<pad>{% endif %}{% endfor %}"
    )
    folder = copied(llama_folder, tmp_path / "pad")
    (folder / "tokenizer.model").unlink()
    write_tokenizer(folder, processor, template=writes_pad, words=["<pad>"], pad_token="<pad>")
    inputs = {"prompt": "Hi", "temperature": 0.0, "max_new_tokens": 3}
    with served(folder) as llama:
        assert llama.prepare(inputs).token_ids
        assert VOCABULARY not in llama.prepare(inputs | {"prompt": "a <pad> typed"}).token_ids
        with pytest.raises(
            InvalidInput, match=f"^E1000 .* token id {VOCABULARY}, .* last token id is {VOCABULARY - 1};"
        ):
            llama.prepare(inputs | {"prompt": "pad"})


def test_a_pad_token_outside_the_table_may_be_named_in_config_json(
    processor: SentencePieceProcessor, llama_folder: Path, tmp_path: Path
) -> None:
    folder = copied(llama_folder, tmp_path / "pad")
    (folder / "tokenizer.model").unlink()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": VOCABULARY}))
    write_tokenizer(folder, processor, template=CHATML, words=["<pad>"], pad_token="<pad>")
    raw = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    raw["model"]["vocab"]["<pad>"] = VOCABULARY
    (folder / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    with served(folder) as llama:
        assert VOCABULARY not in llama.prepare({"prompt": "a <pad> typed"}).token_ids
        assert tokens(llama, PROMPT, 3)


def test_an_end_token_outside_the_table_is_ignored_if_another_one_is_inside(
    processor: SentencePieceProcessor, llama_folder: Path, tmp_path: Path
) -> None:
    folder = copied(llama_folder, tmp_path / "end")
    (folder / "tokenizer.model").unlink()
    write_tokenizer(folder, processor, template=CHATML, words=["<|im_end|>"], eos_token="<|im_end|>")
    with served(folder) as llama:
        assert isinstance(llama._engine, TorchEngine)
        assert llama._engine._batch._eos == {2}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": VOCABULARY}))
    with pytest.raises(BadTokenizer, match=r"the tokens that end an answer \(ids \[700\]\) are all outside"):
        load_llama(Settings(weights=folder))


def test_an_added_token_outside_the_table_is_refused_only_in_a_prompt(
    processor: SentencePieceProcessor, llama_folder: Path, tmp_path: Path
) -> None:
    folder = copied(llama_folder, tmp_path / "added")
    (folder / "tokenizer.model").unlink()
    word = AddedToken("zzyzx", normalized=False, special=False)
    plain = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    write_tokenizer(folder, processor, template=plain, words=[word])
    with served(folder) as llama:
        with pytest.raises(InvalidInput, match="^E1000 "):
            llama.prepare({"prompt": "a zzyzx"})
        assert llama.prepare({"prompt": "a word"}).token_ids


def test_end_token_ids_outside_the_table_are_ignored(llama_folder: Path, tmp_path: Path) -> None:
    generation = json.dumps({"eos_token_id": [2, 7, VOCABULARY, 99_999]})
    folder = copied(llama_folder, tmp_path / "ends", generation_config__json=generation)
    with served(folder) as llama:
        assert isinstance(llama._engine, TorchEngine)
        assert llama._engine._batch._eos == {2, 7}


# --- scaled positions


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 256),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, 1024),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}, 640),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 512),
        (
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
            256,
        ),
        (
            {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            256,
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else str(value),
)
def test_the_longest_context_equals_that_of_vllm(
    tmp_path: Path, scaling: dict[str, Any], context: int
) -> None:
    write_model(tmp_path, max_position_embeddings=256, rope_parameters=scaling)
    config = load_config(tmp_path)
    assert longest_context(config) == context_length(config, None) == context
    assert context_length(config, 100_000) == context
    assert context_length(config, 100) == 100


def test_the_old_rope_scaling_key_is_read(llama_folder: Path, tmp_path: Path) -> None:
    folder = copied(llama_folder, tmp_path / "old")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["rope_parameters"]
    scaling = {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}}
    (folder / "config.json").write_text(json.dumps({**config, **scaling, "max_position_embeddings": 512}))
    assert longest_context(load_config(folder)) == 2048


def test_a_model_with_linear_scaling_answers_beyond_its_trained_positions(
    llama_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stretched"
    scaling = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    write_model(folder, max_position_embeddings=128, rope_parameters=scaling)
    shutil.copy(llama_folder / "tokenizer.model", folder)
    prompt = [1, *(3 + i % 600 for i in range(399))]
    with served(folder) as llama:
        assert llama._engine.context_length == 512
        assert tokens(llama, prompt, 20) == by_transformers(folder, prompt, 20)


@pytest.fixture(scope="module")
def dynamic_folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dynamic")
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    write_model(folder, max_position_embeddings=128, rope_parameters=scaling)
    shutil.copy(llama_folder / "tokenizer.model", folder)
    return folder


@pytest.mark.parametrize("context", [None, 128, 300])
def test_with_dynamic_scaling_a_short_request_gets_the_answer_of_transformers(
    dynamic_folder: Path, context: int | None
) -> None:
    with served(dynamic_folder, max_context=context) as llama:
        assert llama._engine.context_length == (context or 512)
        assert tokens(llama, PROMPT, 20) == by_transformers(dynamic_folder, PROMPT, 20)


def test_with_dynamic_scaling_the_positions_of_a_long_request_do_not_change_others(
    dynamic_folder: Path,
) -> None:
    """The answers are the same alone, in a batch, and after requests that begin with the same tokens."""
    long = [*PROMPT, *(3 + i % 600 for i in range(300))]
    with served(dynamic_folder) as llama:
        alone = tokens(llama, long, 20)
    with served(dynamic_folder, COG_MAX_CONCURRENCY=3) as llama:
        before = tokens(llama, PROMPT, 20)
        params = SamplingParams(temperature=0.0, max_new_tokens=20, min_new_tokens=20)
        streams = [llama._engine.submit(prompt, params) for prompt in (PROMPT, long, PROMPT, long, PROMPT)]
        answers = [[token for piece in stream for token in piece] for stream in streams]
        assert answers == [before, alone, before, alone, before]
        assert before == by_transformers(dynamic_folder, PROMPT, 20)
        assert tokens(llama, long, 20) == alone


def test_dynamically_scaled_positions_equal_those_of_transformers(dynamic_folder: Path) -> None:
    config = load_config(dynamic_folder)
    model = LlamaForCausalLM.from_pretrained(dynamic_folder, dtype=torch.float32)
    cos, _ = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(512)[None])
    parts = take_apart(model, Placement(model.device, model.dtype, "none", 512))
    assert parts.stretched_from == 128
    torch.testing.assert_close(parts.cos[128:, 0], cos[0])


# --- byte order marks


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_byte_order_mark_at_the_start_of_a_file_is_ignored(
    llama_folder: Path, tmp_path: Path, name: str
) -> None:
    folder = copied(llama_folder, tmp_path / "marked", tokenizer_config__json="{}")
    (folder / name).write_bytes(codecs.BOM_UTF8 + (folder / name).read_bytes())
    with served(folder) as llama:
        assert tokens(llama, PROMPT, 3)


def test_only_the_files_of_the_tokenizer_are_copied_without_byte_order_marks(tmp_path: Path) -> None:
    for name in ("tokenizer_config.json", "model.safetensors", "pytorch_model.bin", "consolidated.00.pth"):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + b"{}")
    with without_byte_order_marks(tmp_path) as clean:
        assert {path.name: path.read_bytes() for path in clean.iterdir()} == {"tokenizer_config.json": b"{}"}
    assert not clean.exists()


def test_a_byte_order_mark_at_the_start_of_a_line_of_the_manifest_is_ignored(tmp_path: Path) -> None:
    lines = "\ufeffhttps://h.example/a.json a.json\n\ufeffhttps://h.example/b.json b.json\n"
    (tmp_path / "weights.txt").write_text(lines, "utf-8")
    assert [entry.destination for entry in read_manifest(tmp_path / "weights.txt")] == ["a.json", "b.json"]
    assert all(entry.url.startswith("https:") for entry in read_manifest(tmp_path / "weights.txt"))


def test_a_tokenizer_with_many_more_tokens_than_the_table_is_refused(
    llama_folder: Path, tmp_path: Path
) -> None:
    write_model(tmp_path, vocab_size=500)
    shutil.copy(llama_folder / "tokenizer.model", tmp_path)
    with pytest.raises(BadTokenizer, match="has 700 tokens, but vocab_size"):
        load_llama(Settings(weights=tmp_path))


def test_a_prompt_with_a_token_outside_the_table_is_refused(
    processor: SentencePieceProcessor, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, processor, template=CHATML, words=CHATML_WORDS)
    tokenizer = load_tokenizer(tmp_path)
    limits = PromptLimits(context=100, longest_piece=16)
    assert encode_within(limits, Dialog("", ("Hi",)), tokenizer)
    tokenizer.restrict(701)
    with pytest.raises(InvalidInput, match="token id 701, .* last token id is 700;"):
        encode_within(limits, Dialog("", ("Hi",)), tokenizer)


def test_without_scaling_the_context_is_max_position_embeddings() -> None:
    assert longest_context(LlamaConfig(max_position_embeddings=4096)) == 4096
