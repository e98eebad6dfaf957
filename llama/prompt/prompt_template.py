"""The input `prompt_template`: a caller's own format around the prompt.

Knows the placeholders, the published default in its spellings, and which control words mean a
control token where; knows nothing of token ids.
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
    """A control token, by the word that stands for it in a template."""

    BOS = "<s>"
    EOS = "</s>"


@dataclass(frozen=True, slots=True)
class FormattedPrompt:
    """A prompt in the caller's own format: runs of text and control tokens. BOS comes in front."""

    parts: tuple[str | Control, ...]


class PromptTemplate:
    """A caller's `prompt_template`, other than the published default.

    Raises BadPromptTemplate when it has no `{prompt}`.
    """

    def __init__(self, template: str) -> None:
        if "\n" not in template:
            template = template.replace("\\n", "\n")
        # Literal text at even places, the names of placeholders at odd ones.
        self._pieces = [piece for piece in _PLACEHOLDER.split(template) if piece is not None]
        if "prompt" not in self._pieces[1::2]:
            raise BadPromptTemplate(
                f"prompt_template has {len(template)} characters and no {{prompt}} in it; "
                "put {prompt} where the prompt belongs or leave prompt_template out"
            )

    @property
    def is_raw(self) -> bool:
        """`{prompt}` alone: the prompt is the whole formatted text, control words included."""
        return self._pieces[1::2] == ["prompt"] and not "".join(self._pieces[0::2]).strip()

    @property
    def is_open_dialogue(self) -> bool:
        """`[INST]` without `[/INST]`: the prompt is expected to bring the rest."""
        literal = "".join(self._pieces[0::2])
        return B_INST in literal and E_INST not in literal

    @property
    def is_for_llama_3(self) -> bool:
        return any("<|start_header_id|>" in piece for piece in self._pieces[0::2])

    def repeated(self, prompt: str, system_prompt: str) -> int:
        """Characters that are filled in beyond once each: by these the expanded text outgrows its parts."""
        names = self._pieces[1::2]
        filled = {"prompt": len(prompt), "system_prompt": len(system_prompt)}
        return sum(filled[name] * (names.count(name) - 1) for name in set(names))

    def expand(self, prompt: str, system_prompt: str) -> str:
        """The template with both placeholders filled in, as one text."""
        return "".join(text for text, _ in self._fill(prompt, system_prompt))

    def format(self, prompt: str, system_prompt: str) -> FormattedPrompt:
        """Runs of text and control tokens. What was filled in stays text, except on the raw route."""
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
    """Whether a template is blank or the published default in any spelling."""
    plain = template.replace("\\n", "\n").replace("\r\n", "\n").strip().removeprefix("<s>").strip()
    plain = _PLACEHOLDER.sub(lambda m: f"{{{m[1] or m[2]}}}", plain)
    return plain in ("", PUBLISHED_DEFAULT)


def raw_text(prompt: str) -> str:
    """What the raw route keeps of a prompt: no blanks at its end and no BOS at its start."""
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
    """Neighbouring runs of text as one, so that a tokenizer sees them as they will be read."""
    run = list[str]()
    for part in parts:
        if isinstance(part, str):
            run.append(part)
            continue
        yield from filter(None, ["".join(run)])
        run.clear()
        yield part
    yield from filter(None, ["".join(run)])
