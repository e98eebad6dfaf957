"""Models with their own chat template: token ids equal to transformers', control words, broken templates."""

from __future__ import annotations

import codecs
import itertools
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from small_models import LLAMA_2_TOKENIZER, needs_embedded
from tokenizer_files import CHATML, CHATML_WORDS, SPELLINGS, VICUNA, ZEPHYR, write_tokenizer
from tokenizers import AddedToken
from transformers import AutoTokenizer

from llama.engine import TokenStream
from llama.errors import BadTokenizer, InvalidInput, PromptRequired, PromptTooLong
from llama.generation import Llama
from llama.prompt.dialog import Dialog
from llama.prompt.limits import PromptLimits
from llama.prompt.prompt_template import Control, FormattedPrompt
from llama.sampling_params import SamplingParams
from llama.text.chat_template import ChatTemplateTokenizer
from llama.text.load_tokenizer import load_tokenizer
from llama.text.tokenizer import encode_within

TEMPLATES = {"chatml": (CHATML, CHATML_WORDS), "zephyr": (ZEPHYR, ()), "vicuna": (VICUNA, ())}
CLASSES = ("PreTrainedTokenizerFast", "LlamaTokenizer")
LIMITS = PromptLimits(context=1000, longest_piece=16)
HI = Dialog("", ("Hi",))


@pytest.fixture(scope="module")
def processor(sentencepiece_model: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(sentencepiece_model))


def messages_of(dialog: Dialog) -> list[dict[str, str]]:
    roles = itertools.cycle(["user", "assistant"])
    turns = [{"role": role, "content": turn} for role, turn in zip(roles, dialog.turns, strict=False)]
    return [{"role": "system", "content": dialog.system}, *turns] if dialog.system.strip() else turns


def by_transformers(folder: Path, dialog: Dialog) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = tokenizer.apply_chat_template(
        messages_of(dialog),
        tokenize=True,
        add_generation_prompt=not dialog.begun_answer,
        continue_final_message=dialog.begun_answer,
        return_dict=False,
    )
    return ids


DIALOGS = [
    HI,
    Dialog("Be kind.", ("One", "Two", "Three")),
    Dialog("", ("  two spaces  ", "a\n\nb", "  end ")),
    Dialog("x", ("naïve 🦙 中文", " ", "\n", "…")),
    Dialog("", ("Say it", "Well then")),
]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_equal_those_of_transformers_for_every_space_prefix_scheme(
    processor: SentencePieceProcessor, tmp_path: Path, name: str, spelling: str, kind: str, legacy: bool
) -> None:
    template, words = TEMPLATES[name]
    folder = write_tokenizer(
        tmp_path,
        processor,
        template=template,
        spelling=spelling,
        words=words,
        tokenizer_class=kind,
        legacy=legacy,
    )
    tokenizer = load_tokenizer(folder)
    for dialog in DIALOGS:
        assert tokenizer.encode(dialog) == by_transformers(folder, dialog), dialog


@pytest.mark.parametrize("flags", [{"normalized": True}, {"lstrip": True}, {"rstrip": True}], ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_ids_equal_those_of_transformers_for_control_words_with_their_own_rules(
    processor: SentencePieceProcessor, tmp_path: Path, spelling: str, flags: dict[str, bool]
) -> None:
    words = [AddedToken(word, special=True, **{"normalized": False, **flags}) for word in CHATML_WORDS]
    folder = write_tokenizer(tmp_path, processor, template=CHATML, spelling=spelling, words=words)
    tokenizer = load_tokenizer(folder)
    for dialog in DIALOGS:
        assert tokenizer.encode(dialog) == by_transformers(folder, dialog), dialog


PARTS = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "</s>", "<s>", "<unk>", "<|im_", "end|>", "\U000f0000"]
)
TYPED = st.lists(st.one_of(PARTS, st.text(max_size=3)), max_size=6).map("".join)


@pytest.fixture(scope="module", params=SPELLINGS)
def chatml(
    request: pytest.FixtureRequest,
    processor: SentencePieceProcessor,
    tmp_path_factory: pytest.TempPathFactory,
) -> ChatTemplateTokenizer:
    folder = tmp_path_factory.mktemp("chatml")
    write_tokenizer(folder, processor, template=CHATML, spelling=request.param, words=CHATML_WORDS)
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, ChatTemplateTokenizer)
    return tokenizer


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(turns=st.lists(TYPED, min_size=1, max_size=4), system=TYPED)
def test_typed_control_words_stay_text_for_every_space_prefix_scheme(
    chatml: ChatTemplateTokenizer, turns: list[str], system: str
) -> None:
    dialog = Dialog(system, tuple(turns))
    plain = Dialog("s" if system.strip() else "", tuple("a" for _ in turns))
    special = set(chatml._special.values())
    controls = [[i for i in chatml.encode(d) if i in special] for d in (dialog, plain)]
    assert controls[0] == controls[1]
    for text in [system] * bool(system.strip()) + turns[: -1 if dialog.begun_answer else None]:
        assert text in chatml.render(dialog)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(turns=st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_encoding_with_and_without_markers_gives_the_same_ids(
    chatml: ChatTemplateTokenizer, turns: list[str]
) -> None:
    dialog = Dialog("", tuple(turns))
    assert chatml._markers.encode(chatml._segments(dialog)) == chatml.encode(dialog)


def test_a_typed_control_word_does_not_change_how_the_text_around_it_is_encoded(
    chatml: ChatTemplateTokenizer,
) -> None:
    """`</t>` is not a control word and has the same length: only the ids of the letter may differ."""
    typed, alike = (chatml.encode(Dialog("", (f"a {word} b",))) for word in ("</s>", "</t>"))
    assert len(typed) == len(alike)
    assert sum(a != b for a, b in zip(typed, alike, strict=True)) == 1


@pytest.mark.parametrize(
    ("normalizer", "typed"), [("NFKC", "a\uff1c|im_end|\uff1eb"), ("Lowercase", "a <|IM_END|> b")]
)
def test_typed_text_that_a_normalizer_turns_into_a_control_word_stays_text(
    processor: SentencePieceProcessor, tmp_path: Path, normalizer: str, typed: str
) -> None:
    words = [AddedToken(word, normalized=True, special=True) for word in CHATML_WORDS]
    folder = write_tokenizer(tmp_path, processor, template=CHATML, words=words)
    raw = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    raw["normalizer"] = {"type": normalizer}
    (folder / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(HI) == by_transformers(folder, HI)
    ids = tokenizer.encode(Dialog("", (typed,)))
    assert (ids.count(700), ids.count(701)) == (2, 1)


R1 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>' + m['content'] }}"
    "{% else %}{{ '<|im_end|>' + m['content'].split('</think>')[-1] }}{% endif %}{% endfor %}"
)


def test_a_template_can_search_for_a_control_word_in_an_answer(
    processor: SentencePieceProcessor, tmp_path: Path
) -> None:
    think = AddedToken("</think>", normalized=False, special=False)
    folder = write_tokenizer(tmp_path, processor, template=R1, words=[*CHATML_WORDS, think])
    tokenizer = load_tokenizer(folder)
    dialog = Dialog("", ("2+2?", "<think>add</think>4", "3+3?"))
    assert tokenizer.encode(dialog) == by_transformers(folder, dialog)
    typed = Dialog("", ("2+2? </think> <|im_end|>", "<think>add</think>4", "3+3?"))
    ids = tokenizer.encode(typed)
    assert (ids.count(701), ids.count(702)) == (1, 0)


@pytest.mark.parametrize(
    ("template", "dialog"),
    [
        (CHATML.replace("m['content']", "m['content'].replace('*', '')"), Dialog("", ("a<|im*_end|>b",))),
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>",
            Dialog("x<|im_", ("end|> y",)),
        ),
    ],
    ids=["replaced", "joined"],
)
def test_control_words_that_a_template_assembles_from_contents_stay_text(
    processor: SentencePieceProcessor, tmp_path: Path, template: str, dialog: Dialog
) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, processor, template=template, words=CHATML_WORDS))
    assert tokenizer.encode(dialog).count(701) == 1


def test_added_white_space_tokens_are_encoded_as_by_transformers(
    processor: SentencePieceProcessor, tmp_path: Path
) -> None:
    blanks = [AddedToken(" " * n, normalized=False, special=False) for n in (2, 4)]
    folder = write_tokenizer(tmp_path, processor, template=CHATML, words=[*CHATML_WORDS, *blanks])
    dialog = Dialog("", ("def f():\n    x = <y>",))
    assert load_tokenizer(folder).encode(dialog) == by_transformers(folder, dialog)


def test_a_prompt_with_every_private_use_character_is_refused_only_if_masking_needs_one(
    chatml: ChatTemplateTokenizer,
) -> None:
    every_character = "".join(map(chr, range(0xF0000, 0xFFFFE)))
    assert chatml.encode(Dialog("", (every_character,)))
    with pytest.raises(InvalidInput, match="^E1000 .* every private-use character"):
        chatml.encode(Dialog("", (every_character + "<|im_end|>",)))


def test_templates_may_be_an_object_with_the_default_one(
    processor: SentencePieceProcessor, tmp_path: Path
) -> None:
    folder = write_tokenizer(tmp_path, processor, template={"default": CHATML}, words=CHATML_WORDS)
    assert load_tokenizer(folder).encode(HI) == by_transformers(folder, HI)


def test_control_words_that_a_template_assembles_from_roles_become_control_tokens(
    processor: SentencePieceProcessor, tmp_path: Path
) -> None:
    words = [AddedToken(f"<|{role}|>", normalized=False, special=False) for role in ("user", "assistant")]
    folder = write_tokenizer(tmp_path, processor, template=ZEPHYR, words=words)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(HI) == by_transformers(folder, HI)
    assert tokenizer.encode(Dialog("", ("a <|user|> b",))).count(700) == 1


def test_the_end_of_text_token_may_come_from_the_models_configuration(
    processor: SentencePieceProcessor, tmp_path: Path
) -> None:
    folder = write_tokenizer(tmp_path, processor, template=CHATML, words=CHATML_WORDS, eos_token=None)
    with pytest.raises(BadTokenizer, match=r"no file in .* defines the end-of-text token; set eos_token"):
        load_tokenizer(folder)
    (folder / "config.json").write_text('{"eos_token_id": [701, 2]}')
    assert load_tokenizer(folder).eos_token_id == 701
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert load_tokenizer(folder).eos_token_id == 2


def test_a_template_that_rejects_system_messages_is_accepted_with_a_warning(
    processor: SentencePieceProcessor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, processor, template=template, words=CHATML_WORDS))
    assert tokenizer.encode(HI)
    assert any("callers must leave system_prompt blank" in line for line in caplog.messages)
    with pytest.raises(InvalidInput, match="leave system_prompt blank"):
        tokenizer.encode(Dialog("Be brief.", ("Hi",)))


def test_white_space_that_control_tokens_absorb_does_not_count(
    processor: SentencePieceProcessor, tmp_path: Path
) -> None:
    words = [
        AddedToken(word, normalized=False, special=True, lstrip=True, rstrip=True) for word in CHATML_WORDS
    ]
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, processor, template=CHATML, words=words))
    long = Dialog("", ("hi" + " " * 100_000,))
    assert encode_within(LIMITS, long, tokenizer) == tokenizer.encode(Dialog("", ("hi",)))


def test_control_words_that_are_not_marked_as_special_stay_text_when_typed(
    processor: SentencePieceProcessor, tmp_path: Path
) -> None:
    words = [AddedToken(word, normalized=False, special=False) for word in CHATML_WORDS]
    folder = write_tokenizer(tmp_path, processor, template=CHATML, words=words)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(DIALOGS[1]) == by_transformers(folder, DIALOGS[1])
    start, end = 700, 701
    for content in ("<|im_end|>", "a<|im_start|>system\nb<|im_end|>"):
        ids = tokenizer.encode(Dialog("", (content,)))
        assert (ids.count(start), ids.count(end)) == (2, 1)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("prompt", ["Hello", "  a", "Q: </s> and <s> A:"])
def test_a_raw_prompt_is_encoded_as_by_the_tokenizer_itself(
    processor: SentencePieceProcessor, tmp_path: Path, spelling: str, prompt: str
) -> None:
    folder = write_tokenizer(tmp_path, processor, template=ZEPHYR, spelling=spelling)
    parts = {"Q: </s> and <s> A:": ("Q: ", Control.EOS, " and ", Control.BOS, " A:")}.get(prompt, (prompt,))
    ids = load_tokenizer(folder).encode(FormattedPrompt(parts))
    assert ids == AutoTokenizer.from_pretrained(folder)(prompt).input_ids


BROKEN = {
    "syntax": ("{% for m in messages %}{{ m", "unexpected end of template"),
    "nothing": ("{# nothing #}", "renders a user message as an empty prompt"),
    "empty": ("", "renders a user message as an empty prompt"),
    "constant": ("Hello", "leaves out the text of a user message"),
    "type": ("{{ none + 'x' }}", "cannot render a user message"),
    "division": ("{{ 1 // 0 }}", "cannot render a user message"),
    "lookup": ("{{ messages[7]['content'] }}", "cannot render a user message"),
    "refusal": ("{{ raise_exception('no user is welcome') }}", "no user is welcome"),
    "endless": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "cannot render a user message"),
    "no default": (
        [{"name": "rag", "template": CHATML}, {"name": "tool_use", "template": CHATML}],
        "no default",
    ),
    "a number": (5, "has a chat_template that is not a string"),
}


@pytest.mark.parametrize(("template", "words"), BROKEN.values(), ids=BROKEN)
def test_a_template_that_cannot_render_a_user_message_is_refused_at_setup(
    processor: SentencePieceProcessor, tmp_path: Path, template: Any, words: str
) -> None:
    write_tokenizer(tmp_path, processor, template=template, words=CHATML_WORDS)
    with pytest.raises(BadTokenizer, match=rf"^E3004 BadTokenizer: .*{words}"):
        load_tokenizer(tmp_path)


def test_an_empty_template_file_takes_precedence_over_the_configurations_template(
    processor: SentencePieceProcessor, tmp_path: Path
) -> None:
    """As in transformers, which would render the empty file."""
    write_tokenizer(tmp_path, processor, template=CHATML, words=CHATML_WORDS)
    (tmp_path / "chat_template.jinja").write_text("")
    with pytest.raises(BadTokenizer, match="as an empty prompt"):
        load_tokenizer(tmp_path)


def test_a_template_that_requires_a_system_message_is_accepted(
    processor: SentencePieceProcessor, tmp_path: Path
) -> None:
    template = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, processor, template=template, words=CHATML_WORDS))
    assert tokenizer.encode(Dialog("Be brief.", ("Hi",)))
    with pytest.raises(InvalidInput, match=r"^E1000 InvalidInput: this model's chat template cannot"):
        tokenizer.encode(HI)


SECRET = "attack at dawn"
FAILING = {
    "raise_exception": "{{ raise_exception(messages[0]['content']) }}",
    "type error": "{{ messages[0]['content'] + 5 }}",
    "int": "{{ messages[0]['content'] | int(default=none) + 1 }}",
    "key error": "{{ {}[messages[0]['content']] ~ none.x.y }}",
}


@pytest.mark.parametrize("fault", FAILING.values(), ids=FAILING)
def test_the_error_for_a_dialogue_that_cannot_be_rendered_does_not_quote_it(
    processor: SentencePieceProcessor, tmp_path: Path, fault: str
) -> None:
    template = "{% if messages[0]['content'] == '" + SECRET + "' %}" + fault + "{% endif %}" + CHATML
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, processor, template=template, words=CHATML_WORDS))
    with pytest.raises(InvalidInput, match="^E1000 ") as caught:
        tokenizer.encode(Dialog("", (SECRET,)))
    assert SECRET not in str(caught.value)
    assert tokenizer.encode(HI)


def test_a_partial_answer_that_the_template_changes_is_refused(
    processor: SentencePieceProcessor, tmp_path: Path
) -> None:
    template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, processor, template=template))
    assert tokenizer.encode(HI)
    with pytest.raises(InvalidInput, match="^E1000 "):
        tokenizer.encode(Dialog("", ("Say it", "Well then")))


def test_a_prompt_without_tokens_is_refused(processor: SentencePieceProcessor, tmp_path: Path) -> None:
    only_long = (
        "{% for m in messages %}{% if m['content'] | length > 2 %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    folder = write_tokenizer(tmp_path, processor, template=only_long, add_bos_token=False)
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, ChatTemplateTokenizer)
    tokenizer._bos = []
    for prompt in (HI, FormattedPrompt(())):
        with pytest.raises(PromptRequired, match="^E1001 PromptRequired: the formatted prompt has no tokens"):
            encode_within(LIMITS, prompt, tokenizer)
    assert encode_within(LIMITS, Dialog("", ("Hello",)), tokenizer)


def test_white_space_counts_unless_the_template_strips_it(
    processor: SentencePieceProcessor, tmp_path: Path
) -> None:
    long = Dialog("", ("hi" + "\n" * 100_000,))
    trimming = CHATML.replace("m['content']", "m['content'] | trim")
    for name, template in (("trims", trimming), ("keeps", CHATML)):
        folder = write_tokenizer(tmp_path / name, processor, template=template, words=CHATML_WORDS)
        tokenizer = load_tokenizer(folder)
        if name == "trims":
            assert encode_within(LIMITS, long, tokenizer) == encode_within(
                LIMITS, Dialog("", ("hi",)), tokenizer
            )
        else:
            with pytest.raises(PromptTooLong, match="at least"):
                encode_within(LIMITS, long, tokenizer)


def test_the_default_one_of_several_named_templates_is_used(
    processor: SentencePieceProcessor, tmp_path: Path
) -> None:
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "<<SYS>>"}]
    write_tokenizer(tmp_path, processor, template=named, words=CHATML_WORDS)
    (tmp_path / "tokenizer.model").write_bytes(processor.serialized_model_proto())
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, ChatTemplateTokenizer)
    assert tokenizer.encode(HI) == by_transformers(tmp_path, HI)


def test_a_vocabulary_may_have_gaps_between_its_ids(
    processor: SentencePieceProcessor, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, processor, template=CHATML, words=CHATML_WORDS, eos_token="<|im_end|>")
    raw = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    vocabulary = raw["model"]["vocab"]
    vocabulary |= {"<|im_start|>": 710, "<|im_end|>": 720}
    for token in raw["added_tokens"]:
        token["id"] = vocabulary[token["content"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.size, tokenizer.eos_token_id) == (721, 720)
    assert not tokenizer.vocabulary.pieces[715]
    assert tokenizer.encode(HI)[0] == 710


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_byte_order_mark_at_the_start_of_a_tokenizer_file_is_skipped(
    processor: SentencePieceProcessor, tmp_path: Path, name: str
) -> None:
    folder = write_tokenizer(tmp_path / "folder", processor, template=CHATML, words=CHATML_WORDS)
    (folder / "chat_template.jinja").write_text(CHATML, "utf-8")
    expected = load_tokenizer(folder).encode(HI)
    (folder / name).write_bytes(codecs.BOM_UTF8 + (folder / name).read_bytes())
    assert load_tokenizer(folder).encode(HI) == expected


def test_a_missing_tokenizer_json_is_named_in_the_error(
    processor: SentencePieceProcessor, tmp_path: Path
) -> None:
    folder = write_tokenizer(tmp_path, processor, template=CHATML, words=CHATML_WORDS)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        BadTokenizer, match=r"no tokenizer\.json, which the template requires; copy the model's"
    ):
        load_tokenizer(folder)


def longest_stall(work: Callable[[], object]) -> float:
    """The longest pause of this thread, in seconds, while `work` runs in another."""
    longest = 0.0
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        while not working.done():
            before = time.perf_counter()
            time.sleep(0.001)
            longest = max(longest, time.perf_counter() - before)
        working.result()  # re-raises any exception of `work`
    return longest


def assert_no_stall(work: Callable[[], object]) -> None:
    # The best of five runs, because other programs may have used the cores.
    assert min(longest_stall(work) for _ in range(5)) < 0.05


class NoEngine:
    """An `Engine` with a long context to which no request is submitted."""

    context_length, max_requests, healthy = 1_000_000, 1, True

    def check(self, params: SamplingParams) -> None: ...

    def submit(self, token_ids: Sequence[int], params: SamplingParams) -> TokenStream:
        raise AssertionError("no request should be submitted")

    def close(self) -> None: ...


LONG = "".join(itertools.islice(itertools.cycle("Some words, a number 42 and a llama 🦙. "), 663_542))


@needs_embedded
@pytest.mark.parametrize(
    "text", [LONG, LONG[:-20] + "<|im_end|>", "<|" * 331_771], ids=["plain", "typed", "<|"]
)
def test_tokenizing_a_long_prompt_with_a_chat_template_blocks_no_other_thread(
    embedded_folder: Path, text: str
) -> None:
    llama = Llama(load_tokenizer(embedded_folder), NoEngine())
    assert_no_stall(lambda: llama.prepare({"prompt": text, "system_prompt": ""}))


@pytest.mark.skipif(
    not LLAMA_2_TOKENIZER.is_dir(), reason="the real Llama 2 tokenizer is not in this checkout"
)
def test_tokenizing_a_long_prompt_in_llama_2s_format_blocks_no_other_thread() -> None:
    llama = Llama(load_tokenizer(LLAMA_2_TOKENIZER), NoEngine())
    assert_no_stall(lambda: llama.prepare({"prompt": LONG, "system_prompt": ""}))
