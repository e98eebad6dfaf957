"""The input `prompt_template`: a caller's custom format for the prompt.

Knows the placeholders, the variants of the published default, and which control words become control tokens;
knows nothing about token ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from llama.errors import BadPromptTemplate
from llama.prompt.dialog import B_INST, E_INST

PUBLISHED_DEFAULT = "[INST] <<SYS>>\n{system_prompt}\n<</SYS>>\n\n{prompt} [/INST]"

_PLACEHOLDER = re.compile(r"\{\{(prompt|system_prompt)\}\}|\{(prompt|system_prompt)\}")
_CONTROL_WORD = re.compile(r"(</?s>)")
_LEADING_BOS = re.compile(r"\s*(?:<s>\s*)*<s>")


class Control(Enum):
    """A control token. The value is the word that stands for it in a template."""

    BOS = "<s>"
    EOS = "</s>"


@dataclass(frozen=True, slots=True)
class FormattedPrompt:
    """A prompt in a custom format: runs of text and control tokens, without the BOS at the start."""

    parts: tuple[str | Control, ...]


class PromptTemplate:
    """A caller's `prompt_template` that differs from the published default.

    Raises BadPromptTemplate if it does not contain `{prompt}`.
    """

    def __init__(self, template: str) -> None:
        if "\n" not in template:
            template = template.replace("\\n", "\n")
        # Even indices contain literal text, odd indices the names of placeholders.
        self._pieces = [piece for piece in _PLACEHOLDER.split(template) if piece is not None]
        if "prompt" not in self._pieces[1::2]:
            raise BadPromptTemplate(
                "prompt_template does not contain {prompt}; put {prompt} where the prompt belongs, or leave "
                "prompt_template out"
            )

    @property
    def is_raw(self) -> bool:
        """Whether the template is only `{prompt}`, so that the prompt is the whole formatted text."""
        return self._pieces[1::2] == ["prompt"] and not "".join(self._pieces[0::2]).strip()

    @property
    def is_open_dialogue(self) -> bool:
        """Whether the template has `[INST]` but no `[/INST]`, so that the prompt must close the turn."""
        literal = "".join(self._pieces[0::2])
        return B_INST in literal and E_INST not in literal

    @property
    def is_for_llama_3(self) -> bool:
        return any("<|start_header_id|>" in piece for piece in self._pieces[0::2])

    def repeated(self, prompt: str, system_prompt: str) -> int:
        """The number of characters that repeated placeholders add, beyond the first use of each."""
        names = self._pieces[1::2]
        filled = {"prompt": len(prompt), "system_prompt": len(system_prompt)}
        return sum(filled[name] * (names.count(name) - 1) for name in set(names))

    def expand(self, prompt: str, system_prompt: str) -> str:
        """Fill in the placeholders and return the result as one text."""
        return "".join(text for text, _ in self._fill(prompt, system_prompt))

    def format(self, prompt: str, system_prompt: str) -> FormattedPrompt:
        """Fill in the placeholders and return runs of text and control tokens.

        Control words in the filled-in text stay text, unless the template is raw.
        """
        if self.is_raw:
            return FormattedPrompt(tuple(_control_words(raw_text(prompt))))
        parts = list[str | Control]()
        for text, is_filled in self._fill(prompt, system_prompt):
            if is_filled:
                parts.append(text)
            else:
                parts.extend(_control_words(text if parts else _drop_leading_bos(text)))
        return FormattedPrompt(tuple(_joined(parts)))

    def _fill(self, prompt: str, system_prompt: str) -> Iterator[tuple[str, bool]]:
        filled = {"prompt": prompt, "system_prompt": system_prompt}
        for index, piece in enumerate(self._pieces):
            yield (filled[piece], True) if index % 2 else (piece, False)


def is_default(template: str) -> bool:
    """Whether a template is blank or a variant of the published default.

    Variants differ in their line breaks, in single or double braces, or in a `<s>` in front.
    """
    plain = template.replace("\\n", "\n").replace("\r\n", "\n").strip().removeprefix("<s>").strip()
    plain = _PLACEHOLDER.sub(lambda m: f"{{{m[1] or m[2]}}}", plain)
    return plain in ("", PUBLISHED_DEFAULT)


def raw_text(prompt: str) -> str:
    """The text of a prompt for a raw template, without white space at its end and without BOS in front."""
    return _drop_leading_bos(prompt.rstrip())


def _drop_leading_bos(text: str) -> str:
    match = _LEADING_BOS.match(text)
    return text[match.end() :] if match else text


def _control_words(text: str) -> Iterator[str | Control]:
    for index, piece in enumerate(_CONTROL_WORD.split(text)):
        if index % 2:
            yield Control(piece)
        elif piece:
            yield piece


def _joined(parts: list[str | Control]) -> Iterator[str | Control]:
    """Join adjacent runs of text, so that a tokenizer encodes them together."""
    run = list[str]()
    for part in parts:
        if isinstance(part, str):
            run.append(part)
            continue
        yield from filter(None, ["".join(run)])
        run.clear()
        yield part
    yield from filter(None, ["".join(run)])
