"""The input `prompt_template`: variants of its default, its placeholders and control words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.errors import BadPromptTemplate, PromptRequired
from llama.prompt.dialog import Dialog
from llama.prompt.limits import PromptLimits
from llama.prompt.prompt_template import (
    PUBLISHED_DEFAULT,
    Control,
    FormattedPrompt,
    PromptTemplate,
    is_default,
)
from llama.prompt.request import Request
from llama.serving.schema import input_defaults
from predict import Predictor

BOS, EOS = Control.BOS, Control.EOS
LIMITS = PromptLimits(context=4096, longest_piece=16)
DEFAULTS = input_defaults(Predictor.run)


def read(template: str, prompt: str = "Hi!", system_prompt: str = "nice") -> Request:
    inputs: dict[str, Any] = {"prompt": prompt, "system_prompt": system_prompt, "prompt_template": template}
    return Request.from_inputs({**DEFAULTS, **inputs}, LIMITS)


@pytest.mark.parametrize(
    "template",
    [
        "",
        "  \n",
        PUBLISHED_DEFAULT,
        "<s>" + PUBLISHED_DEFAULT,
        "<s> " + PUBLISHED_DEFAULT + "\n",
        PUBLISHED_DEFAULT.replace("\n", "\\n"),
        PUBLISHED_DEFAULT.replace("\n", "\r\n"),
        PUBLISHED_DEFAULT.replace("{", "{{").replace("}", "}}"),
        ("<s>" + PUBLISHED_DEFAULT).replace("\n", "\\n").replace("{", "{{").replace("}", "}}"),
    ],
)
@pytest.mark.parametrize("prompt", ["Hi!", "[INST] a [/INST] b [INST] c [/INST]"])
def test_every_variant_of_the_published_default_is_the_same_as_no_template(
    template: str, prompt: str
) -> None:
    assert is_default(template)
    assert read(template, prompt).prompt == read("", prompt).prompt


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("Q: {prompt}\nA:", ("Q: Hi!\nA:",)),
        ("Q: {{prompt}} A:", ("Q: Hi! A:",)),
        ("{system_prompt}: {prompt} {prompt}", ("nice: Hi! Hi!",)),
        ("Q: {prompt}\\nA:", ("Q: Hi!\nA:",)),
        ("Q:\n{prompt}\\nA:", ("Q:\nHi!\\nA:",)),
        ("[INST] {prompt} [/INST]", ("[INST] Hi! [/INST]",)),
        ("<s>[INST] {prompt} [/INST]", ("[INST] Hi! [/INST]",)),
        (" <s>[INST] {prompt} [/INST]", ("[INST] Hi! [/INST]",)),
        ("a</s><s>{prompt}", ("a", EOS, BOS, "Hi!")),
        ("{system_prompt}<s>{prompt}</s>", ("nice", BOS, "Hi!", EOS)),
        ("{other} {0} { prompt } {prompt}", ("{other} {0} { prompt } Hi!",)),
        ("{{{prompt}}}", ("{Hi!}",)),
    ],
)
def test_placeholders_are_replaced_by_plain_text(template: str, parts: tuple[str | Control, ...]) -> None:
    assert read(template).prompt == FormattedPrompt(parts)


def test_placeholders_and_control_words_in_filled_in_text_stay_text() -> None:
    request = read(
        "S: {system_prompt} P: {prompt}", prompt="</s> {system_prompt} \\n", system_prompt="{prompt}<s>"
    )
    assert request.prompt == FormattedPrompt(("S: {prompt}<s> P: </s> {system_prompt} \\n",))


@pytest.mark.parametrize("template", ["{prompt}", " {prompt}\n", "{{prompt}}"])
@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("as it is ", ("as it is",)),
        (
            "<s>[INST] a [/INST] b </s><s>[INST] c [/INST] ",
            ("[INST] a [/INST] b ", EOS, BOS, "[INST] c [/INST]"),
        ),
        ("<s><s> a", (" a",)),
        (" a", (" a",)),
        ("a </s>", ("a ", EOS)),
        ("{prompt} {system_prompt}", ("{prompt} {system_prompt}",)),
    ],
)
def test_with_a_raw_template_the_prompt_is_the_whole_formatted_text(
    template: str, prompt: str, parts: tuple[str | Control, ...]
) -> None:
    assert read(template, prompt).prompt == FormattedPrompt(parts)


@pytest.mark.parametrize(
    ("template", "prompt", "dialog"),
    [
        (
            "<s>[INST] <<SYS>>\n{system_prompt}\n<</SYS>>\n\n{prompt}",
            "hi [/INST] hello</s><s>[INST] bye [/INST]",
            Dialog("nice", ("hi", "hello", "bye")),
        ),
        ("[INST] {prompt}", "hi [/INST] hello", Dialog("", ("hi", "hello"))),
        ("[INST] {prompt}", "hi", Dialog("", ("hi",))),
    ],
)
def test_a_template_without_a_closing_tag_is_filled_in_and_parsed_as_a_dialogue(
    template: str, prompt: str, dialog: Dialog
) -> None:
    assert read(template, prompt).prompt == dialog


@pytest.mark.parametrize(
    "template", ["no placeholder", "{Prompt}", "{system_prompt}", "{ prompt }", "[INST] [/INST]"]
)
def test_a_template_without_a_prompt_placeholder_is_refused(template: str) -> None:
    with pytest.raises(BadPromptTemplate, match=r"^E1003 BadPromptTemplate: .*\{prompt\}"):
        read(template)


@pytest.mark.parametrize("template", ["{prompt}", "Q: {prompt}", "[INST] {prompt}"])
def test_a_template_with_a_blank_prompt_is_refused(template: str) -> None:
    with pytest.raises(PromptRequired):
        read(template, " \n")


def test_a_llama_3_template_causes_a_warning() -> None:
    request = read("<|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|>")
    assert any(note.startswith("warning: ") and "Llama 3" in note for note in request.notes)
    assert not any("warning" in note for note in read("Q: {prompt}").notes)


TEXT = st.text("ab<>/s{}[INST]\\n \n")


@given(TEXT, TEXT, TEXT, TEXT)
def test_only_control_words_of_the_template_become_control_tokens(
    a: str, b: str, prompt: str, system: str
) -> None:
    template = PromptTemplate(a + "x{prompt}x{system_prompt}" + b)  # not a raw template
    parts = template.format(prompt, system).parts
    controls = sum(isinstance(part, Control) for part in parts)
    assert controls <= a.count("<s>") + a.count("</s>") + b.count("<s>") + b.count("</s>")
    assert "x" + prompt.replace("\ud800", "") + "x" in "".join(
        p if isinstance(p, str) else p.value for p in parts
    )


@given(TEXT, TEXT, TEXT, TEXT)
def test_the_size_of_repeated_text_is_known_before_the_template_is_filled_in(
    a: str, b: str, prompt: str, system: str
) -> None:
    template = PromptTemplate(a + "{prompt}{system_prompt}" + b)
    once = len(template.expand("", "")) + len(prompt) + len(system)
    assert template.repeated(prompt, system) == len(template.expand(prompt, system)) - once
