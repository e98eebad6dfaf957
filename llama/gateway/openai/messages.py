"""Turns the messages of a chat completion into a dialogue of the predictor.

The predictor takes one system message, then alternating user and assistant messages; OpenAI allows any order.
Knows roles and contents; knows nothing about the other members of a body.
"""

from __future__ import annotations

from typing import Any

from llama.errors import json_type
from llama.gateway.openai.members import invalid, unknown, unsupported

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_WITHOUT_EFFECT = frozenset({"name"})
# Clients send these back in the assistant's messages. Empty ones have no effect.
_EMPTY = frozenset({"annotations", "audio", "function_call", "refusal", "tool_call_id", "tool_calls"})
_PART_WITHOUT_EFFECT = frozenset({"prompt_cache_breakpoint"})

BETWEEN_MESSAGES = "\n\n"
"""Joins messages that the predictor can only take as one."""
BETWEEN_PARTS = "\n"
"""Joins the text parts of one message, as other OpenAI-compatible servers do."""


def read_messages(messages: list[Any]) -> list[dict[str, str]]:
    """Return the dialogue: the system message, if there is one, then alternating user and assistant ones.

    All system messages are joined and moved to the front, and consecutive ones of the same role are joined.
    Raises Problem 400 if a message cannot be used, or if a Llama 2 dialogue cannot begin or end like this.
    """
    system, turns = list[str](), list[tuple[str, list[str]]]()
    for index, message in enumerate(messages):
        role, content = _read(f"messages[{index}]", message)
        if role == "system":
            system.append(content)
        elif turns and turns[-1][0] == role:
            turns[-1][1].append(content)
        elif role == "assistant" and not turns:
            raise invalid(
                f"messages[{index}].role",
                f"Invalid 'messages[{index}].role': a dialogue with this model has to begin with a user "
                "message; add one in front of the assistant's message.",
            )
        else:
            turns.append((role, [content]))
    dialog = [{"role": role, "content": _joined(contents)} for role, contents in turns]
    _check(dialog)
    instructions = _joined(system)
    return [{"role": "system", "content": instructions}, *dialog] if instructions else dialog


def _check(dialog: list[dict[str, str]]) -> None:
    if not dialog:
        raise invalid("messages", "Invalid 'messages': there is no user message; add one.")
    if dialog[-1]["role"] == "user" and not dialog[-1]["content"].strip():
        raise invalid("messages", "Invalid 'messages': the last user message is blank; add a text to it.")


def _joined(contents: list[str]) -> str:
    return BETWEEN_MESSAGES.join(filter(None, contents))


def _read(place: str, message: Any) -> tuple[str, str]:
    """The role and the content of one message."""
    if not isinstance(message, dict):
        raise _wrong_type(place, "an object", message)
    for name, value in message.items():
        if name in ("role", "content") or name in _WITHOUT_EFFECT or value is None:
            continue
        if name not in _EMPTY:
            raise unknown(f"{place}.{name}")
        if value and message.get("role") != "tool":
            raise unsupported(f"{place}.{name}", f"'{place}.{name}' is not supported with this model.")
    role = message.get("role")
    if not isinstance(role, str):
        raise _wrong_type(f"{place}.role", "a string", role)
    if role not in _ROLES:
        raise invalid(
            f"{place}.role",
            f"Invalid '{place}.role': this model supports the roles 'system', 'developer', 'user' and "
            "'assistant'.",
        )
    return _ROLES[role], _text(f"{place}.content", message.get("content"))


def _text(place: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong_type(place, "a string or an array of text parts", content)
    return BETWEEN_PARTS.join(_part(place, index, part) for index, part in enumerate(content))


def _part(place: str, index: int, part: Any) -> str:
    if not isinstance(part, dict):
        raise _wrong_type(place, "an array of objects", part)
    if part.get("type") != "text":
        raise unsupported(
            place,
            f"Unsupported content in '{place}': part {index} is not a text, and this model reads only text.",
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise _wrong_type(place, f"a string as the text of part {index}", text)
    for name, value in part.items():
        if name not in ("type", "text") and name not in _PART_WITHOUT_EFFECT and value is not None:
            detail = f"Unrecognized request argument supplied: {place}[{index}].{name[:100]}"
            raise invalid(place, detail, code="unknown_parameter")
    return text


def _wrong_type(place: str, expected: str, value: object) -> Exception:
    if value is None:
        return invalid(place, f"Missing required parameter: '{place}'.", code="missing_required_parameter")
    return invalid(
        place, f"Invalid type for '{place}': expected {expected}, but got {json_type(value)}.", "invalid_type"
    )
