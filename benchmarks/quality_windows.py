"""Cut a text into windows of tokens: a prompt that a model reads, and tokens that it then has to predict.

Knows token ids; knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.prompt.prompt_template import FormattedPrompt
from llama.text.tokenizer import Tokenizer

PROMPT = 64
"""The number of tokens at the start of a window that are read as a prompt and not scored."""
SCORED = 256
"""The number of tokens after the prompt. They are scored, and the next window's scored tokens follow them."""
LENGTH = PROMPT + SCORED
_FEWEST = 4  # windows; with fewer, a standard error means little


class TextTooShort(ValueError):
    """The text has fewer tokens than _FEWEST windows."""


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of a text. Every token after the first prompt is scored once."""

    token_ids: Tensor
    """[windows, LENGTH], on the CPU."""
    text_tokens: int
    """The number of tokens of the whole text."""


def cut(text: str, tokenizer: Tokenizer) -> Windows:
    """Encode a text, and cut it into windows that start every SCORED tokens.

    Every window begins with the beginning-of-sequence token if the tokenizer adds one to prompts. Tokens at
    the end that do not fill a window are left out. Raises TextTooShort.
    """
    start = tokenizer.encode(FormattedPrompt(()))
    token_ids = tokenizer.encode(FormattedPrompt((text,)))[len(start) :]
    return Windows(_cut(token_ids, start), len(token_ids))


def _cut(token_ids: Sequence[int], start: Sequence[int]) -> Tensor:
    length = LENGTH - len(start)
    needed = length + (_FEWEST - 1) * SCORED
    if len(token_ids) < needed:
        raise TextTooShort(
            f"the text has {len(token_ids)} tokens, but at least {needed} are needed ({_FEWEST} windows of "
            f"{LENGTH} tokens, one every {SCORED}); use a longer text"
        )
    windows = torch.tensor(token_ids).unfold(0, length, SCORED)
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(len(windows), -1), windows], dim=1)
