"""The bodies of OpenAI's responses: whole completions, and the chunks of a stream.

The fixed parts of a chunk are serialized once per choice, because a chunk is written for every piece of every
answer. Knows bodies; knows nothing about HTTP or predictions.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llama.gateway.problems import Problem

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"

# ASCII only: some clients end a line at U+2028 and its like.
to_json = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode


@dataclass(frozen=True)
class TokenUsage:
    """Token counts of all choices together. A prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int

    def body(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True)
class Choice:
    """A complete answer."""

    text: str
    finish_reason: str


@dataclass(frozen=True)
class Completion:
    """What a whole completion and all chunks of a stream have in common."""

    model: str
    is_chat: bool
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: Sequence[Choice], usage: TokenUsage) -> dict[str, Any]:
        """The response to a request that is not streamed."""
        write = self._chat_choice if self.is_chat else self._text_choice
        return {
            **self.head(),
            "choices": [write(index, choice) for index, choice in enumerate(choices)],
            "usage": usage.body(),
        }

    def head(self, *, is_chunk: bool = False) -> dict[str, Any]:
        """The members that come before the choices."""
        kind = "chat.completion.chunk" if is_chunk else "chat.completion"
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.id}",
            "object": kind if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    @staticmethod
    def _chat_choice(index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None, "annotations": []},
            "logprobs": None,
            "finish_reason": choice.finish_reason,
        }

    @staticmethod
    def _text_choice(index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "text": choice.text,
            "logprobs": None,
            "finish_reason": choice.finish_reason,
        }


class Chunks:
    """Writes the events of one stream. Every method returns whole events.

    The events have no ids: after an event with an id, OpenAI's Python client does not accept comments.
    """

    def __init__(self, completion: Completion, choices: int, *, include_usage: bool) -> None:
        self._completion, self._count = completion, choices
        self._usage: dict[str, Any] = {"usage": None} if include_usage else {}
        self._text = [self._split_around_text(index) for index in range(choices)]

    def first(self) -> bytes:
        """What comes before the first text: the role of every choice, in a chat."""
        if not self._completion.is_chat:
            return b""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._event(index, {"delta": delta}) for index in range(self._count))

    def text(self, index: int, text: str) -> bytes:
        """A piece of a choice's answer."""
        before, after = self._text[index]
        return f"{before}{to_json(text)}{after}".encode()

    def last(self, index: int, finish_reason: str) -> bytes:
        """The end of a choice."""
        content: dict[str, Any] = {"delta": {}} if self._completion.is_chat else {"text": ""}
        return self._event(index, content, finish_reason)

    def end(self, usage: TokenUsage) -> bytes:
        """The end of the stream, with the usage if the client asked for it."""
        if not self._usage:
            return DONE
        return _data({**self._completion.head(is_chunk=True), "choices": [], "usage": usage.body()}) + DONE

    def _event(self, index: int, content: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}
        return _data({**self._completion.head(is_chunk=True), "choices": [choice], **self._usage})

    def _split_around_text(self, index: int) -> tuple[str, str]:
        """The event of a piece of text: what comes before the text, and what comes after it."""
        content: dict[str, Any] = {"delta": {"content": ""}} if self._completion.is_chat else {"text": ""}
        name = '"content":' if self._completion.is_chat else '"text":'
        before, _, after = self._event(index, content).decode().rpartition(f'{name}""')
        return before + name, after


def error_event(problem: Problem) -> bytes:
    """The event that ends a stream whose completion failed."""
    return _data(problem.for_openai())


def _data(body: dict[str, Any]) -> bytes:
    return f"data: {to_json(body)}\n\n".encode()
