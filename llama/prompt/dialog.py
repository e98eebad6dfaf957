"""Dialogues: what the inputs `prompt`, `system_prompt` and `messages` mean.

A tagged `prompt` is read by a scanner with two states: inside a user turn only `[/INST]` means
anything, inside an answer only `[INST]` does. Knows Llama 2's tags and the order of turns; knows
nothing of token ids, of templates, or of how a dialogue is spelt for a model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama.errors import BadMessages, PromptRequired

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>", "<</SYS>>"

_LEAD = re.compile(r"[\s\ufeff]*(?:<s>[\s\ufeff]*)*")


@dataclass(frozen=True, slots=True)
class Dialog:
    """A system prompt and turns: user, assistant, user, ... An assistant turn at the end is an answer
    that has been begun and is to be continued. A blank system prompt means that there is none."""

    system: str
    turns: tuple[str, ...]

    @property
    def begun_answer(self) -> bool:
        return len(self.turns) % 2 == 0

    @property
    def characters(self) -> int:
        """Characters of all contents, without surrounding blanks: most formats strip them."""
        return sum(len(content.strip()) for content in (self.system, *self.turns))


def read_prompt(prompt: str, system_prompt: str) -> Dialog:
    """Read `prompt` as a tagged dialogue or, when it does not start as one, as one user message.

    Raises PromptRequired when the last user turn is blank and no answer is begun.
    """
    start = _skip_lead(prompt, 0)
    if prompt.startswith(B_INST, start) or _system_block(prompt, start, start) is not None:
        return _checked(_read_tagged(prompt, start, system_prompt))
    return _checked(Dialog(system_prompt, (prompt,)))


def read_messages(messages: Sequence[Any], system_prompt: str) -> Dialog:
    """Read `[{"role": ..., "content": ...}]`: an optional system message, then user and assistant
    in turn. Tags inside contents are text.

    Raises BadMessages with the index of the first message at fault, PromptRequired.
    """
    system, turns = system_prompt, list[str]()
    for index, message in enumerate(messages):
        role, content = _role_and_content(index, message)
        if role == "system" and index == 0:
            system = content
            continue
        expected = "assistant" if len(turns) % 2 else "user"
        if role != expected:
            raise BadMessages(
                f"message {index} has the role {role} where {expected} is expected; send an optional "
                "system message first, then user and assistant in turn"
            )
        turns.append(content)
    if not turns:
        raise BadMessages("message 0 is the only one and is a system message; add a user message")
    if len(turns) % 2 == 0 and not turns[-1].strip():
        turns.pop()  # nothing has been begun
    return _checked(Dialog(system, tuple(turns)))


def _role_and_content(index: int, message: Any) -> tuple[str, str]:
    advice = 'send {"role": "system", "user" or "assistant", "content": a string}'
    if not isinstance(message, dict):
        raise BadMessages(f"message {index} is of type {type(message).__name__}; {advice}")
    if missing := {"role", "content"} - message.keys():
        raise BadMessages(f"message {index} has no {min(missing)}; {advice}")
    if len(message) > 2:
        raise BadMessages(f"message {index} has other keys than role and content; {advice}")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in ("system", "user", "assistant"):
        raise BadMessages(f"message {index} has an unknown role; {advice}")
    if not isinstance(content, str):
        raise BadMessages(f"message {index} has content of type {type(content).__name__}; {advice}")
    return role, content


def _checked(dialog: Dialog) -> Dialog:
    if not dialog.begun_answer and not dialog.turns[-1].strip():
        raise PromptRequired("the last user turn is blank; send a prompt or messages with words in them")
    return dialog


def _skip_lead(text: str, position: int) -> int:
    match = _LEAD.match(text, position)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def _system_block(text: str, start: int, latest: int) -> tuple[int, int, str] | None:
    """The first whole `<<SYS>>...<</SYS>>` that begins in [start, latest]: begin, end and content."""
    begin = text.find(B_SYS, start, latest + len(B_SYS))
    if begin < 0 or (close := text.find(E_SYS, begin)) < 0:
        return None
    return begin, close + len(E_SYS), text[begin + len(B_SYS) : close].strip()


def _read_tagged(text: str, position: int, system_prompt: str) -> Dialog:
    system = None
    if block := _system_block(text, position, position):
        _, position, system = block
    opening = _skip_lead(text, position)
    if text.startswith(B_INST, opening):
        position = opening + len(B_INST)

    turns = _scan(text, position)
    if system is None and (block := _system_block(turns[0], 0, len(turns[0]))):
        begin, end, system = block
        turns[0] = turns[0][:begin] + turns[0][end:]
    return Dialog(
        system_prompt if system is None else system,
        tuple(turn.strip() for turn in turns),
    )


def _scan(text: str, position: int) -> list[str]:
    """Turns from `position`, which is inside the first user turn; a blank begun answer is left out."""
    turns = list[str]()
    while True:
        close = text.find(E_INST, position)
        if close < 0:  # an unclosed last user turn is closed for the caller
            return [*turns, text[position:]]
        turns.append(text[position:close])
        position = close + len(E_INST)

        begin = text.find(B_INST, position)
        answer = _end_of_answer(text[position:] if begin < 0 else text[position:begin], last=begin < 0)
        if begin < 0:
            return [*turns, answer] if answer.strip() else turns
        turns.append(answer)
        position = begin + len(B_INST)


def _end_of_answer(answer: str, *, last: bool) -> str:
    """Without the control words that callers write between turns: `</s>` at the answer's end and,
    where an `[INST]` follows, `<s>` in front of it."""
    end = len(answer.rstrip())
    for word in ("</s>",) if last else ("<s>", "</s>"):
        while answer.endswith(word, 0, end):
            end -= len(word)
            while end and answer[end - 1].isspace():
                end -= 1
    return answer[:end]
