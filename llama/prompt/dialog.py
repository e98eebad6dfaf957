"""Parses the inputs `prompt`, `system_prompt` and `messages` into a dialogue.

A scanner with two states reads a tagged `prompt`: inside a user turn it recognizes only `[/INST]`, and inside
an answer only `[INST]`. Knows Llama 2's tags and the order of turns; knows nothing about token ids, templates
or how a dialogue is formatted for a model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama.errors import BadMessages, PromptRequired, json_type

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>", "<</SYS>>"

_LEAD = re.compile(r"[\s\ufeff]*(?:<s>[\s\ufeff]*)*")


@dataclass(frozen=True, slots=True)
class Dialog:
    """A system prompt and turns that alternate: user, assistant, user, and so on.

    An assistant turn at the end is a partial answer, which the model continues. A blank system prompt means
    that there is none.
    """

    system: str
    turns: tuple[str, ...]

    @property
    def begun_answer(self) -> bool:
        """Whether the last turn is a partial answer."""
        return len(self.turns) % 2 == 0

    @property
    def characters(self) -> int:
        """The number of characters in all contents, without outer white space, which most formats strip."""
        return sum(len(content.strip()) for content in (self.system, *self.turns))


def read_prompt(prompt: str, system_prompt: str) -> Dialog:
    """Parse `prompt` as a tagged dialogue or, if it does not start like one, as one user message.

    Raises PromptRequired if the dialogue ends with a blank user turn.
    """
    start = _skip_lead(prompt, 0)
    if prompt.startswith(B_INST, start) or _system_block(prompt, start, start) is not None:
        return _checked(_read_tagged(prompt, start, system_prompt))
    return _checked(Dialog(system_prompt, (prompt,)))


def read_messages(messages: Sequence[Any], system_prompt: str) -> Dialog:
    """Parse a list of messages, `[{"role": ..., "content": ...}]`.

    An optional system message comes first, then user and assistant messages alternate. Tags in the contents
    are text. Raises BadMessages with the index of the first invalid message, and PromptRequired if the
    dialogue ends with a blank user turn.
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
                f"message {index} has the role {role}, but {expected} is expected; send an optional system "
                "message first, then alternate user and assistant messages"
            )
        turns.append(content)
    if not turns:
        raise BadMessages("message 0 is a system message and no other message follows; add a user message")
    if len(turns) % 2 == 0 and not turns[-1].strip():
        turns.pop()  # a blank answer is not a partial answer
    return _checked(Dialog(system, tuple(turns)))


def _role_and_content(index: int, message: Any) -> tuple[str, str]:
    advice = 'send {"role": "user", "content": "..."}, with the role system, user or assistant'
    if not isinstance(message, dict):
        raise BadMessages(f"message {index} is {json_type(message)}, not an object; {advice}")
    if missing := {"role", "content"} - message.keys():
        raise BadMessages(f"message {index} lacks the key {min(missing)}; {advice}")
    if len(message) > 2:
        raise BadMessages(f"message {index} has keys other than role and content; {advice}")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in ("system", "user", "assistant"):
        raise BadMessages(f"message {index} has an unknown role; {advice}")
    if not isinstance(content, str):
        raise BadMessages(
            f"message {index} has a content that is {json_type(content)}, not a string; {advice}"
        )
    return role, content


def _checked(dialog: Dialog) -> Dialog:
    if not dialog.begun_answer and not dialog.turns[-1].strip():
        raise PromptRequired("the last user turn is blank; add a message for the model to answer")
    return dialog


def _skip_lead(text: str, position: int) -> int:
    match = _LEAD.match(text, position)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def _system_block(text: str, start: int, latest: int) -> tuple[int, int, str] | None:
    """The first closed `<<SYS>>...<</SYS>>` block that begins in [start, latest]: begin, end and content."""
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
    """The turns from `position`, which is inside the first user turn, without a blank answer at the end."""
    turns = list[str]()
    while True:
        close = text.find(E_INST, position)
        if close < 0:  # an unclosed last user turn ends with the text
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
    """Remove the control words that callers write between turns.

    These are `</s>` at the end of an answer and, if an `[INST]` follows, `<s>` in front of it.
    """
    end = len(answer.rstrip())
    for word in ("</s>",) if last else ("<s>", "</s>"):
        while answer.endswith(word, 0, end):
            end -= len(word)
            while end and answer[end - 1].isspace():
                end -= 1
    return answer[:end]
