"""Token ids of a prompt, exactly as the model was trained on them: what every tokenizer has in common.

A prompt is spelt as segments: runs of text, and ids of control tokens. Text never becomes a control token.
Knows nothing of sampling, engines or weights.
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
"""A run of text to be encoded, or the id of a control token."""


Check = Callable[[int], object]


def no_check(_: int) -> None:
    """Of any length."""


def characters(segments: Iterable[Segment]) -> int:
    """Length of the text in segments."""
    return sum(len(segment) for segment in segments if isinstance(segment, str))


class Tokenizer(ABC):
    """A vocabulary and the dialogue format that goes with it."""

    vocabulary: Vocabulary
    text_size: int
    """Ids from here on are control tokens, or words that were added to the vocabulary."""
    eos_token_id: int

    @property
    def size(self) -> int:
        """Number of token ids."""
        return len(self.vocabulary.pieces)

    @property
    def longest_piece(self) -> int:
        """Characters of the longest token: more text than this a token cannot stand for."""
        return max(map(len, self.vocabulary.pieces))

    def restrict(self, size: int) -> None:
        """Forget the ids from `size` on, which the model cannot read."""
        self.vocabulary = replace(self.vocabulary, pieces=self.vocabulary.pieces[:size])

    @abstractmethod
    def encode(self, prompt: Dialog | FormattedPrompt, check: Check = no_check) -> list[int]:
        """The token ids that the model is given. `check` is called with the number of characters that are to
        be encoded, and may raise before they are."""

    def render(self, prompt: Dialog | FormattedPrompt) -> str:
        """What is encoded, as text for people: control tokens are shown as words."""
        return "".join(
            self._control_word(segment) if isinstance(segment, int) else segment
            for segment in self._segments(prompt)
        )

    @abstractmethod
    def _segments(self, prompt: Dialog | FormattedPrompt) -> Iterator[Segment]: ...

    @abstractmethod
    def _control_word(self, token_id: int) -> str: ...


def encode_within(limits: PromptLimits, prompt: Dialog | FormattedPrompt, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a prompt. Raises PromptTooLong if they leave no room for one new token, PromptRequired
    if there are none, InvalidInput if the model has no such token."""
    token_ids = tokenizer.encode(prompt, limits.check_characters)
    if not token_ids:
        raise PromptRequired("the formatted prompt has no tokens; send a prompt with words in it")
    if max(token_ids) >= tokenizer.size:
        raise InvalidInput(
            f"the prompt contains token {max(token_ids)} and the model has {tokenizer.size} tokens; "
            "leave control words out of it"
        )
    limits.check_tokens(len(token_ids))
    return token_ids


def without_surrogates(text: str) -> str:
    """Halves of UTF-16 pairs, which JSON can carry and no tokenizer takes, become U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
