"""Recognizes the turns of one dialogue, and remembers which server has its prefix in its cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

_REMEMBERED = 10_000  # dialogues


def dialogue_of(inputs: Mapping[str, Any]) -> int:
    """A hash that all turns of one dialogue have in common: that of its system prompt and first user turn."""
    system, first = inputs.get("system_prompt"), inputs.get("prompt") or ""
    messages = inputs.get("messages")
    if isinstance(messages, list):
        contents = [
            (message.get("role"), str(message.get("content")))
            for message in messages[:2]
            if isinstance(message, Mapping)
        ]
        contents = contents[: 2 if contents and contents[0][0] == "system" else 1]
        return hash(repr((system, contents)))  # a client's values may not be hashable
    return hash((repr(system), str(first).partition("[/INST]")[0].replace("[INST]", "").strip()))


def continues(inputs: Mapping[str, Any]) -> bool:
    """Whether the inputs contain an earlier answer, so that a server may have their prefix in its cache."""
    messages = inputs.get("messages")
    if isinstance(messages, list):
        return any(
            isinstance(message, Mapping) and message.get("role") == "assistant" for message in messages
        )
    return "[/INST]" in str(inputs.get("prompt"))


class Affinity:
    """The server of each recent dialogue."""

    def __init__(self) -> None:
        self._servers = OrderedDict[int, str]()

    def server_of(self, dialogue: int) -> str | None:
        """Return the URL of the server that answered this dialogue's last turn."""
        return self._servers.get(dialogue)

    def remember(self, dialogue: int, url: str) -> None:
        self._servers[dialogue] = url
        self._servers.move_to_end(dialogue)
        if len(self._servers) > _REMEMBERED:
            self._servers.popitem(last=False)
