"""The interface of every tokenizer, which encodes prompts exactly as in the model's training.

A prompt is a sequence of segments: runs of text, and ids of control tokens. Text is never encoded as a
control token. Knows nothing about sampling, engines or weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from llama.errors import InvalidInput, PromptRequired
from llama.prompt.dialog import Dialog
from llama.prompt.limits import PromptLimits
from llama.prompt.prompt_template import FormattedPrompt
from llama.text.vocabulary import Vocabulary

Segment = str | int
"""A run of text, or the id of a control token."""

Check = Callable[[int], object]


def no_check(_: int) -> None:
    """Accept text of any length."""


def characters(segments: Iterable[Segment]) -> int:
    """The number of characters of text in the segments."""
    return sum(len(segment) for segment in segments if isinstance(segment, str))


class Tokenizer(ABC):
    """A vocabulary and its dialogue format."""

    vocabulary: Vocabulary
    text_size: int
    """Ids from this one on are control tokens, or words that were added to the vocabulary."""
    eos_token_id: int

    @property
    def size(self) -> int:
        """The number of token ids."""
        return len(self.vocabulary.pieces)

    @property
    def longest_piece(self) -> int:
        """The number of characters in the longest token, which is the most that one token can encode."""
        return max(map(len, self.vocabulary.pieces))

    def restrict(self, size: int) -> None:
        """Drop the ids from `size` on, which are not in the model's embedding table."""
        self.vocabulary = replace(self.vocabulary, pieces=self.vocabulary.pieces[:size])

    @abstractmethod
    def encode(self, prompt: Dialog | FormattedPrompt, check: Check = no_check) -> list[int]:
        """Return the token ids of the prompt.

        `check` is called with the number of characters before they are encoded. It may raise to refuse them.
        """

    def render(self, prompt: Dialog | FormattedPrompt) -> str:
        """The formatted prompt as readable text, with control tokens shown as words."""
        return "".join(
            self._control_word(segment) if isinstance(segment, int) else segment
            for segment in self._segments(prompt)
        )

    @abstractmethod
    def _segments(self, prompt: Dialog | FormattedPrompt) -> Iterator[Segment]: ...

    @abstractmethod
    def _control_word(self, token_id: int) -> str: ...


def encode_within(limits: PromptLimits, prompt: Dialog | FormattedPrompt, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a prompt.

    Raises PromptTooLong if they leave no room in the context for one new token, PromptRequired if there are
    none, and InvalidInput if one of them is not a token of the model.
    """
    token_ids = tokenizer.encode(prompt, limits.check_characters)
    if not token_ids:
        raise PromptRequired("the formatted prompt has no tokens; send a prompt that is not blank")
    if max(token_ids) >= tokenizer.size:
        raise InvalidInput(
            f"the prompt contains token id {max(token_ids)}, but the model's last token id is "
            f"{tokenizer.size - 1}; remove control words from the prompt"
        )
    limits.check_tokens(len(token_ids))
    return token_ids


def without_surrogates(text: str) -> str:
    """Replace unpaired UTF-16 surrogates by U+FFFD: JSON can contain them, but tokenizers reject them."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
