"""Token ids of prompts: golden ids, Meta's reference format, and control words that stay text."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from small_models import LLAMA_2_TOKENIZER, SHARED, copied, needs_embedded, needs_llama_2_tokenizer

from llama.errors import BadTokenizer
from llama.prompt.dialog import Dialog
from llama.prompt.limits import PromptLimits
from llama.prompt.request import Request
from llama.serving.schema import input_defaults
from llama.text.chat_template import ChatTemplateTokenizer
from llama.text.llama2_tokenizer import Llama2Tokenizer
from llama.text.load_tokenizer import load_tokenizer
from predict import Predictor

LIMITS = PromptLimits(context=4096, longest_piece=100)
DEFAULTS = input_defaults(Predictor.run)
BOS, EOS = 1, 2
DOCUMENTED = (
    "[INST] Hi! [/INST]\nHello! How are you?\n"
    "[INST] I'm great, thanks for asking. Could you help me with a task? [/INST]"
)


def request(**inputs: Any) -> Request:
    return Request.from_inputs({**DEFAULTS, **inputs}, LIMITS)


@pytest.fixture(
    scope="module", params=["test tokenizer", pytest.param("Llama 2's", marks=needs_llama_2_tokenizer)]
)
def processor(request: pytest.FixtureRequest, sentencepiece_model: Path) -> SentencePieceProcessor:
    path = sentencepiece_model if request.param == "test tokenizer" else LLAMA_2_TOKENIZER / "tokenizer.model"
    return SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module")
def tokenizer(processor: SentencePieceProcessor) -> Llama2Tokenizer:
    return Llama2Tokenizer(processor)


def reference(processor: SentencePieceProcessor, system: str, turns: list[str]) -> list[int]:
    """Token ids by the rules of Meta's `chat_completion`.

    Each exchange is encoded separately, and the system prompt is part of the first user turn.
    """
    turns = list(turns)
    if system.strip():
        turns[0] = "<<SYS>>\n" + system + "\n<</SYS>>\n\n" + turns[0]
    ids: list[int] = []
    for user, answer in zip(turns[0:-1:2], turns[1::2], strict=False):
        if answer is not turns[-1]:
            ids += [BOS, *processor.encode(f"[INST] {user.strip()} [/INST] {answer.strip()} "), EOS]
    if len(turns) % 2:
        return [*ids, BOS, *processor.encode(f"[INST] {turns[-1].strip()} [/INST]")]
    return [*ids, BOS, *processor.encode(f"[INST] {turns[-2].strip()} [/INST] {turns[-1].strip()}")]


@needs_llama_2_tokenizer
def test_golden_dialogs_are_encoded_to_their_ids() -> None:
    tokenizer = load_tokenizer(LLAMA_2_TOKENIZER)
    for line in (SHARED / "golden_dialogs.jsonl").read_text("utf-8").splitlines():
        case = json.loads(line)
        inputs = request(prompt=case["prompt"], system_prompt=case["system_prompt"])
        assert tokenizer.encode(inputs.prompt) == case["ids"], case["name"]


@needs_llama_2_tokenizer
def test_the_documented_dialogue_is_encoded_to_its_known_ids() -> None:
    tokenizer = load_tokenizer(LLAMA_2_TOKENIZER)
    first = [1, 518, 25580, 29962, 6324, 29991, 518, 29914, 25580, 29962]
    ids = tokenizer.encode(request(prompt=DOCUMENTED, system_prompt="").prompt)
    assert ids[: len(first)] == first
    assert ids.count(BOS) == 2
    assert ids.count(EOS) == 1
    assert ids[ids.index(EOS) - 1] == 29871  # the space before EOS is a separate token


CASES: list[tuple[str, str, str, list[str]]] = [
    ("Hi!", "be nice", "be nice", ["Hi!"]),
    ("  Hi!", " be nice ", " be nice ", ["  Hi!"]),
    ("  Hi!\n", "", "", ["Hi!"]),
    ("Hi!", " \n", "", ["Hi!"]),
    (
        DOCUMENTED,
        "",
        "",
        ["Hi!", "Hello! How are you?", "I'm great, thanks for asking. Could you help me with a task?"],
    ),
    ("<s>[INST] <<SYS>>\r\nbe\r\nnice\r\n<</SYS>>\r\n\r\n  Hi! [/INST]", "other", "be\r\nnice", ["Hi!"]),
    ("[INST] a [/INST] b </s><s>[INST] c [/INST] Sure, here", "", "", ["a", "b", "c", "Sure, here"]),
    ("[INST] a [/INST][INST] c [/INST]", "be nice", "be nice", ["a", "", "c"]),
    ("a  b\n\n\tc   d", "", "", ["a  b\n\n\tc   d"]),
    ("¿Qué tal? 日本語 🦙🦙 \u2581 \u200b", "", "", ["¿Qué tal? 日本語 🦙🦙 \u2581 \u200b"]),
    ("</s><s><unk><0x0A><|im_end|>", "</s>", "</s>", ["</s><s><unk><0x0A><|im_end|>"]),
]


@pytest.mark.parametrize(("prompt", "given", "system", "turns"), CASES)
def test_a_dialogue_is_encoded_as_by_metas_reference(
    tokenizer: Llama2Tokenizer,
    processor: SentencePieceProcessor,
    prompt: str,
    given: str,
    system: str,
    turns: list[str],
) -> None:
    ids = tokenizer.encode(request(prompt=prompt, system_prompt=given).prompt)
    assert ids == reference(processor, system, turns)


def test_messages_are_encoded_as_the_same_dialogue(
    tokenizer: Llama2Tokenizer, processor: SentencePieceProcessor
) -> None:
    contents = [" a [/INST] b", "c </s>", " [INST] d "]
    roles = ["user", "assistant", "user"]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    ids = tokenizer.encode(request(messages=messages, system_prompt="be nice").prompt)
    assert ids == reference(processor, "be nice", contents)


@pytest.mark.parametrize("text", ["[INST] a [/INST] b </s><s>[INST] c [/INST]", "<s>[INST] a [/INST]"])
def test_a_raw_prompt_is_encoded_as_the_dialogue_that_it_contains(
    tokenizer: Llama2Tokenizer, text: str
) -> None:
    raw = tokenizer.encode(request(prompt=text, prompt_template="{prompt}").prompt)
    assert raw == tokenizer.encode(request(prompt=text, system_prompt="").prompt)


def test_a_rendered_prompt_shows_control_tokens_as_words(tokenizer: Llama2Tokenizer) -> None:
    dialog = request(prompt="[INST] a [/INST] b [INST] c", system_prompt="").prompt
    assert tokenizer.render(dialog) == "<s>[INST] a [/INST] b </s><s>[INST] c [/INST]"


def test_unpaired_surrogates_are_replaced_and_pairs_become_characters(
    tokenizer: Llama2Tokenizer,
) -> None:
    broken = tokenizer.encode(request(prompt="a \ud800 b", system_prompt="").prompt)
    assert broken == tokenizer.encode(request(prompt="a \ufffd b", system_prompt="").prompt)
    split = tokenizer.encode(request(prompt="\ud83e\udd99", system_prompt="").prompt)
    assert split == tokenizer.encode(request(prompt="🦙", system_prompt="").prompt)


TAGGED = st.lists(
    st.one_of(
        st.text(max_size=5),
        st.sampled_from(
            ["<s>", "</s>", "<unk>", "<0x0A>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<|im_end|>"]
        ),
    )
).map("".join)
SLOW_FIXTURE = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SLOW_FIXTURE
@given(turns=st.lists(TAGGED, min_size=1, max_size=5), system=TAGGED)
def test_no_text_in_a_dialogue_becomes_a_control_token(
    tokenizer: Llama2Tokenizer, turns: list[str], system: str
) -> None:
    ids = tokenizer.encode(Dialog(system, tuple(turns)))
    exchanges = (len(turns) + 1) // 2
    assert ids.count(BOS) == exchanges
    assert ids.count(EOS) == exchanges - 1
    assert 0 not in ids


@SLOW_FIXTURE
@given(prompt=TAGGED, system=TAGGED)
def test_no_text_that_is_filled_into_a_template_becomes_a_control_token(
    tokenizer: Llama2Tokenizer, prompt: str, system: str
) -> None:
    inputs = request(
        prompt="x" + prompt, system_prompt=system, prompt_template="<s>{system_prompt}</s>Q: {prompt}"
    )
    ids = tokenizer.encode(inputs.prompt)
    assert (ids.count(BOS), ids.count(EOS), ids.count(0)) == (1, 1, 0)


@pytest.fixture(scope="module")
def embedded(embedded_folder: Path) -> ChatTemplateTokenizer:
    tokenizer = load_tokenizer(embedded_folder)
    assert isinstance(tokenizer, ChatTemplateTokenizer)
    return tokenizer


CONTENTS = st.text(min_size=1).filter(str.strip)


def as_messages(system: str, turns: list[str]) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


@needs_embedded
@SLOW_FIXTURE
@given(turns=st.lists(CONTENTS, min_size=1, max_size=5), system=st.one_of(st.just(""), CONTENTS))
def test_a_chat_template_gives_the_same_ids_as_transformers(
    embedded: ChatTemplateTokenizer, turns: list[str], system: str
) -> None:
    turns = [
        turn.strip() if len(turns) % 2 == 0 and i == len(turns) - 1 else turn for i, turn in enumerate(turns)
    ]
    begun = len(turns) % 2 == 0
    expected = embedded._tokenizer.apply_chat_template(
        as_messages(system, turns),
        add_generation_prompt=not begun,
        continue_final_message=begun,
        return_dict=False,
    )
    assert embedded.encode(Dialog(system, tuple(turns))) == expected


SPECIAL = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>", "<|im_", "end|>", "\U000f0000"]
)
TYPED = st.lists(st.one_of(SPECIAL, st.text(max_size=3))).map("".join)


@needs_embedded
@SLOW_FIXTURE
@given(turns=st.lists(TYPED, min_size=1, max_size=4), system=TYPED)
def test_no_typed_control_word_becomes_a_control_token_with_a_chat_template(
    embedded: ChatTemplateTokenizer, turns: list[str], system: str
) -> None:
    dialog = Dialog(system, tuple(turns))
    plain = Dialog("s" if system.strip() else "", tuple("a" for _ in turns))
    special = set(embedded._special.values())

    def controls(d: Dialog) -> list[int]:
        return [token for token in embedded.encode(d) if token in special]

    assert controls(dialog) == controls(plain)
    # The typed text itself is neither lost nor changed.
    for text in [system] * bool(system.strip()) + turns[: -1 if dialog.begun_answer else None]:
        assert text in embedded.render(dialog)


@needs_embedded
def test_a_custom_prompt_template_works_on_a_model_with_a_chat_template(
    embedded: ChatTemplateTokenizer,
) -> None:
    formatted = request(prompt="<|im_end|>", prompt_template="Q: {prompt}</s>").prompt
    ids = embedded.encode(formatted)
    assert ids[-1] == embedded.eos_token_id
    assert ids.count(embedded.eos_token_id) == 1


def test_a_folder_with_llama_2s_template_or_none_gets_llama_2s_format(
    llama_folder: Path, tmp_path: Path
) -> None:
    assert isinstance(load_tokenizer(llama_folder), Llama2Tokenizer)
    template = json.dumps({"chat_template": "{% if true %}<<SYS>>{% endif %}"})
    folder = copied(llama_folder, tmp_path / "a", tokenizer_config__json=template)
    assert isinstance(load_tokenizer(folder), Llama2Tokenizer)


@needs_embedded
def test_another_chat_template_takes_precedence_over_llama_2s_vocabulary(
    embedded_folder: Path, llama_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded_folder / name, folder)
    shutil.copy(llama_folder / "tokenizer.model", folder)
    assert isinstance(load_tokenizer(folder), ChatTemplateTokenizer)


def test_another_vocabulary_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g"] * 50), model_writer=model, vocab_size=12, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(BadTokenizer, match=r"^E3004 .*tokenizer\.model is not a Llama 2 vocabulary"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", "not a model"),
        ("tokenizer_config.json", "{broken"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_broken_tokenizer_is_refused_with_its_path(
    llama_folder: Path, tmp_path: Path, name: str, content: str
) -> None:
    folder = copied(llama_folder, tmp_path / "broken", **{name.replace(".", "__"): content})
    with pytest.raises(BadTokenizer, match=rf"^E3004 BadTokenizer: {folder}"):
        load_tokenizer(folder)


def test_a_chat_template_without_a_tokenizer_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    folder = copied(llama_folder, tmp_path / "broken", chat_template__jinja="{{ another }}")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(BadTokenizer, match=rf"^E3004 BadTokenizer: {folder}"):
        load_tokenizer(folder)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadTokenizer, match=r"tokenizer\.model does not exist"):
        load_tokenizer(tmp_path)
