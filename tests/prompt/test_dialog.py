"""Parsing a prompt or messages into a dialogue: tables of cases, and properties."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.errors import BadMessages, PromptRequired
from llama.prompt.dialog import Dialog, read_messages, read_prompt

SYSTEM = "input system"

# id: (prompt, expected turns, expected system prompt; SYSTEM is the input system_prompt)
PROMPTS = {
    # one user message, unchanged
    "plain": ("Hi!", ("Hi!",), SYSTEM),
    "outer white space is kept": ("  Hi!\n", ("  Hi!\n",), SYSTEM),
    "a tag mentioned": ("What is [INST]?", ("What is [INST]?",), SYSTEM),
    "only a closing tag": ("[/INST]", ("[/INST]",), SYSTEM),
    "a closing tag in front": ("[/INST] hi [INST] a [/INST]", ("[/INST] hi [INST] a [/INST]",), SYSTEM),
    "tags inside code": ('print("[INST] hi [/INST]")', ('print("[INST] hi [/INST]")',), SYSTEM),
    "lower-case tags": ("[inst] hi [/inst]", ("[inst] hi [/inst]",), SYSTEM),
    "a control word": ("What is </s>?", ("What is </s>?",), SYSTEM),
    "only a control word": ("<s>", ("<s>",), SYSTEM),
    "an unclosed system block": ("<<SYS>> be nice", ("<<SYS>> be nice",), SYSTEM),
    "a system block after text": ("hi <<SYS>>a<</SYS>>", ("hi <<SYS>>a<</SYS>>",), SYSTEM),
    "only a closing system tag": ("<</SYS>> hi", ("<</SYS>> hi",), SYSTEM),
    # one turn
    "one turn": ("[INST] Hi! [/INST]", ("Hi!",), SYSTEM),
    "no spaces": ("[INST]Hi![/INST]", ("Hi!",), SYSTEM),
    "an unclosed turn": ("[INST] Hi!", ("Hi!",), SYSTEM),
    "bos in front": ("<s>[INST] Hi! [/INST]", ("Hi!",), SYSTEM),
    "bos twice": ("<s><s>[INST] Hi! [/INST]", ("Hi!",), SYSTEM),
    "bos and white space": (" \n<s> <s>\t[INST] Hi! [/INST]", ("Hi!",), SYSTEM),
    "a byte order mark": ("\ufeff[INST] Hi! [/INST]", ("Hi!",), SYSTEM),
    "a byte order mark and bos": ("\ufeff<s>[INST] Hi! [/INST]\n", ("Hi!",), SYSTEM),
    "an opening tag in a user turn": ("[INST] a [INST] b [/INST]", ("a [INST] b",), SYSTEM),
    "control words in a user turn": ("[INST] a </s><s> b [/INST]", ("a </s><s> b",), SYSTEM),
    "eos at the end of a user turn": ("[INST] a</s> [/INST]", ("a</s>",), SYSTEM),
    "only eos after the turn": ("[INST] Hi! [/INST]</s>", ("Hi!",), SYSTEM),
    "only white space after the turn": ("[INST] Hi! [/INST] \n ", ("Hi!",), SYSTEM),
    # several turns
    "two turns": ("[INST] a [/INST] b [INST] c [/INST]", ("a", "b", "c"), SYSTEM),
    "as trained": ("<s>[INST] a [/INST] b </s><s>[INST] c [/INST]", ("a", "b", "c"), SYSTEM),
    "eos without bos": ("[INST] a [/INST] b</s>[INST] c [/INST]", ("a", "b", "c"), SYSTEM),
    "bos without eos": ("[INST] a [/INST] b <s> [INST] c [/INST]", ("a", "b", "c"), SYSTEM),
    "eos and bos twice": ("[INST] a [/INST] b </s></s> <s> <s>[INST] c [/INST]", ("a", "b", "c"), SYSTEM),
    "eos inside an answer": ("[INST] a [/INST] b </s> d [INST] c [/INST]", ("a", "b </s> d", "c"), SYSTEM),
    "bos inside an answer": ("[INST] a [/INST] b <s> d [INST] c [/INST]", ("a", "b <s> d", "c"), SYSTEM),
    "bos in front of eos": ("[INST] a [/INST] b <s></s>[INST] c [/INST]", ("a", "b <s>", "c"), SYSTEM),
    "an empty answer": ("[INST] a [/INST][INST] c [/INST]", ("a", "", "c"), SYSTEM),
    "an empty first turn": ("[INST] [/INST] b [INST] c [/INST]", ("", "b", "c"), SYSTEM),
    "an unclosed last turn": ("[INST] a [/INST] b [INST] c", ("a", "b", "c"), SYSTEM),
    "CRLF line endings": ("[INST] a [/INST]\r\nb\r\n[INST] c [/INST]\r\n", ("a", "b", "c"), SYSTEM),
    "a block in a later turn": (
        "[INST] a [/INST] b [INST] <<SYS>>x<</SYS>> c [/INST]",
        ("a", "b", "<<SYS>>x<</SYS>> c"),
        SYSTEM,
    ),
    # partial answers
    "a partial answer": ("[INST] a [/INST] Sure, ", ("a", "Sure,"), SYSTEM),
    "a partial answer with eos": ("[INST] a [/INST] Sure </s>", ("a", "Sure"), SYSTEM),
    "a closing tag in an answer": ("[INST] a [/INST] b [/INST] c", ("a", "b [/INST] c"), SYSTEM),
    "bos at the end of a partial answer": ("[INST] a [/INST] b </s><s>", ("a", "b </s><s>"), SYSTEM),
    "a partial answer after two user turns": (
        "[INST] a [/INST] b [INST] c [/INST] d",
        ("a", "b", "c", "d"),
        SYSTEM,
    ),
    "a partial answer to a blank turn": ("[INST] [/INST] Once upon", ("", "Once upon"), SYSTEM),
    # system blocks
    "as documented": ("[INST] <<SYS>>\nnice\n<</SYS>>\n\nHi! [/INST]", ("Hi!",), "nice"),
    "CRLF line endings in a block": (
        "[INST] <<SYS>>\r\nnice\r\n<</SYS>>\r\n\r\nHi! [/INST]",
        ("Hi!",),
        "nice",
    ),
    "no white space": ("[INST]<<SYS>>nice<</SYS>>Hi![/INST]", ("Hi!",), "nice"),
    "lines inside a block": ("[INST] <<SYS>> a\n\n b <</SYS>> Hi! [/INST]", ("Hi!",), "a\n\n b"),
    "a block in front": ("<<SYS>>nice<</SYS>>[INST] Hi! [/INST]", ("Hi!",), "nice"),
    "a block in front of bos": ("<<SYS>>nice<</SYS>> <s>[INST] Hi! [/INST]", ("Hi!",), "nice"),
    "a block in front of plain text": ("<<SYS>>nice<</SYS>> Hi!", ("Hi!",), "nice"),
    "a block in front of a closed turn": ("<<SYS>>nice<</SYS>> Hi! [/INST] Yes", ("Hi!", "Yes"), "nice"),
    "a block in the middle of a turn": ("[INST] a<<SYS>>nice<</SYS>>b [/INST]", ("ab",), "nice"),
    "a block at the end": ("[INST] Hi! <<SYS>>nice<</SYS>> [/INST]", ("Hi!",), "nice"),
    "two blocks": ("[INST] <<SYS>>1<</SYS>><<SYS>>2<</SYS>> a [/INST]", ("<<SYS>>2<</SYS>> a",), "1"),
    "a block in front and one inside": (
        "<<SYS>>1<</SYS>>[INST] <<SYS>>2<</SYS>> a [/INST]",
        ("<<SYS>>2<</SYS>> a",),
        "1",
    ),
    "an empty block": ("[INST] <<SYS>>\n\n<</SYS>>\n\nHi! [/INST]", ("Hi!",), ""),
    "an empty block in front": ("<<SYS>><</SYS>>[INST] Hi! [/INST]", ("Hi!",), ""),
    "an unclosed block": ("[INST] <<SYS>> nice Hi! [/INST]", ("<<SYS>> nice Hi!",), SYSTEM),
    "a block closed after its turn": (
        "[INST] <<SYS>> a [/INST] b <</SYS>> [INST] c [/INST]",
        ("<<SYS>> a", "b <</SYS>>", "c"),
        SYSTEM,
    ),
    "an opening tag in a block": ("[INST] <<SYS>>[INST]<</SYS>> Hi! [/INST]", ("Hi!",), "[INST]"),
}


@pytest.mark.parametrize(("prompt", "turns", "system"), PROMPTS.values(), ids=PROMPTS.keys())
def test_a_prompt_is_parsed_into_turns_and_a_system_prompt(
    prompt: str, turns: tuple[str, ...], system: str
) -> None:
    assert read_prompt(prompt, SYSTEM) == Dialog(system, turns)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " \n",
        "[INST]",
        "[INST] [/INST]",
        "[INST][/INST]",
        "<s>[INST]  [/INST] </s>",
        "[INST] a [/INST] b [INST]",
        "[INST] a [/INST] b [INST] \n [/INST]",
        "[INST] <<SYS>>nice<</SYS>> [/INST]",
        "<<SYS>>nice<</SYS>>",
    ],
)
def test_a_blank_last_user_turn_is_refused(prompt: str) -> None:
    with pytest.raises(PromptRequired, match=r"^E1001 PromptRequired: "):
        read_prompt(prompt, SYSTEM)


TAGS = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>", " ", "\n", "\r\n", "\ufeff", "a", "[", "]"]


@given(st.one_of(st.text(), st.lists(st.sampled_from(TAGS)).map("".join)))
def test_any_text_is_a_dialogue_or_is_refused_as_blank(prompt: str) -> None:
    try:
        dialog = read_prompt(prompt, SYSTEM)
    except PromptRequired:
        return
    assert dialog.begun_answer == (len(dialog.turns) % 2 == 0)
    assert dialog.turns[-1].strip()


@given(st.lists(st.sampled_from(TAGS), min_size=1).map("".join))
def test_a_prompt_that_starts_with_plain_text_is_one_message(text: str) -> None:
    assert read_prompt("Hi! " + text, SYSTEM) == Dialog(SYSTEM, ("Hi! " + text,))


WORDS = st.text("ab c", min_size=1).filter(str.strip)


@given(st.lists(WORDS, min_size=1, max_size=6), st.sampled_from(["", "<s>"]), st.sampled_from(["", "</s>"]))
def test_turns_in_llama_2s_format_are_parsed_back(turns: list[str], bos: str, eos: str) -> None:
    text = ""
    for index, turn in enumerate(turns):
        text += f"{bos}[INST] {turn} [/INST]" if index % 2 == 0 else f" {turn} {eos}"
    assert read_prompt(text, SYSTEM).turns == tuple(turn.strip() for turn in turns)


def message(role: str, content: str = "x") -> dict[str, str]:
    return {"role": role, "content": content}


MESSAGES: list[tuple[list[dict[str, str]], Dialog]] = [
    ([message("user", " Hi! ")], Dialog(SYSTEM, (" Hi! ",))),
    ([message("system", " nice "), message("user", "a")], Dialog(" nice ", ("a",))),
    ([message("system", ""), message("user", "a")], Dialog("", ("a",))),
    (
        [message("user", "a"), message("assistant", "b"), message("user", "c")],
        Dialog(SYSTEM, ("a", "b", "c")),
    ),
    ([message("user", "a"), message("assistant", "b")], Dialog(SYSTEM, ("a", "b"))),
    ([message("user", "a"), message("assistant", " ")], Dialog(SYSTEM, ("a",))),
    ([message("user", "[INST] a [/INST] <<SYS>>")], Dialog(SYSTEM, ("[INST] a [/INST] <<SYS>>",))),
    ([message("user", ""), message("assistant", "b")], Dialog(SYSTEM, ("", "b"))),
]


@pytest.mark.parametrize(("messages", "dialog"), MESSAGES)
def test_messages_become_unchanged_turns(messages: list[dict[str, str]], dialog: Dialog) -> None:
    assert read_messages(messages, SYSTEM) == dialog


USER, ASSISTANT = message("user"), message("assistant")


@pytest.mark.parametrize(
    ("messages", "index"),
    [
        ([ASSISTANT], 0),
        ([USER, USER], 1),
        ([USER, ASSISTANT, ASSISTANT], 2),
        ([USER, ASSISTANT, USER, message("system")], 3),
        ([message("system"), message("system")], 1),
        ([message("system")], 0),
        ([message("system"), ASSISTANT], 1),
        ([USER, message("tool")], 1),
        ([{"role": 1, "content": "x"}], 0),
        ([{"role": ["user"], "content": "x"}], 0),
        ([{"role": "user"}], 0),
        ([{"content": "x"}], 0),
        ([{}], 0),
        ([USER, ASSISTANT, {"role": "user", "content": None}], 2),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], 0),
        ([{**USER, "name": "x"}], 0),
        ([USER, "assistant"], 1),
        ([None], 0),
    ],
)
def test_invalid_messages_are_refused_with_the_index(messages: list[Any], index: int) -> None:
    with pytest.raises(BadMessages, match=rf"^E1005 BadMessages: message {index} "):
        read_messages(messages, SYSTEM)


def test_a_blank_last_user_message_is_refused() -> None:
    with pytest.raises(PromptRequired):
        read_messages([USER, ASSISTANT, message("user", " ")], SYSTEM)
