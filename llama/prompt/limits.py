"""Refuses prompts that do not fit in the context, by characters before encoding and by tokens afterwards.

Knows only lengths; knows nothing about the contents of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama.errors import PromptTooLong


@dataclass(frozen=True, slots=True)
class PromptLimits:
    """The length of the context in tokens, and the number of characters in the longest token."""

    context: int
    longest_piece: int

    def check_characters(self, characters: int) -> None:
        """Raise PromptTooLong if a text of this length cannot fit, however it is encoded."""
        self.check_at_least(-(-characters // self.longest_piece))

    def check_at_least(self, tokens: int) -> None:
        """Raise PromptTooLong if a prompt of at least this many tokens leaves no room for one new token."""
        if tokens >= self.context:
            self._refuse(tokens, "at least ")

    def check_tokens(self, tokens: int) -> None:
        """Raise PromptTooLong if a prompt of this many tokens leaves no room for one new token."""
        if tokens >= self.context:
            self._refuse(tokens, "")

    def _refuse(self, tokens: int, at_least: str) -> None:
        raise PromptTooLong(
            f"the prompt is {at_least}{tokens} tokens and the model's context is {self.context}; "
            f"shorten it by at least {tokens - self.context + 1} tokens"
        )
