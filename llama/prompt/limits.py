"""Refuses a prompt that cannot fit the context: by its characters before it is encoded, by its tokens
afterwards.

Knows lengths; knows nothing of what a prompt says.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama.errors import PromptTooLong


@dataclass(frozen=True, slots=True)
class PromptLimits:
    """What a context can hold: its length in tokens, and the characters of the longest token."""

    context: int
    longest_piece: int

    def check_characters(self, characters: int) -> None:
        """Refuse a text that is too long whatever its tokens are, before any work is put into it."""
        self.check_at_least(-(-characters // self.longest_piece))

    def check_at_least(self, tokens: int) -> None:
        """The same for a prompt of which only a lower bound is known."""
        if tokens >= self.context:
            self._refuse(tokens, "at least ")

    def check_tokens(self, tokens: int) -> None:
        """Refuse a prompt that leaves no room for one new token."""
        if tokens >= self.context:
            self._refuse(tokens, "")

    def _refuse(self, tokens: int, at_least: str) -> None:
        raise PromptTooLong(
            f"the prompt is {at_least}{tokens} tokens and the model's context is {self.context}; "
            f"shorten it by at least {tokens - self.context + 1} tokens"
        )
