"""Encodes text in which control tokens are given by id, so that everything else is encoded as text.

Knows the `tokenizers` library's added tokens; knows nothing of dialogues or templates.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterable, Mapping

from tokenizers import AddedToken, Tokenizer

from llama.errors import InvalidInput
from llama.text.tokenizer import Segment, without_surrogates

PRIVATE = range(0xF0000, 0xFFFFE)
"""Code points without a meaning."""


class ControlMarkers:
    """A copy of a tokenizer in which control words are ordinary text.

    A control token is written as a marker: random private characters, which no caller can guess, with the
    same rules about the white space around it. So all is encoded as one string, as transformers does it.
    """

    def __init__(self, tokenizer: Tokenizer, control_words: Mapping[str, int]) -> None:
        added = tokenizer.get_added_tokens_decoder()
        tokens = {i: added.get(i) or AddedToken(word, normalized=False) for word, i in control_words.items()}
        self._tokenizer = copy.deepcopy(tokenizer)
        # Only tokens that are known as special can be switched off.
        self._tokenizer.add_special_tokens([*tokens.values()])
        self._tokenizer.encode_special_tokens = True
        random = secrets.SystemRandom()
        self._marker = {i: "".join(map(chr, random.choices(PRIVATE, k=8))) for i in tokens}
        self._tokenizer.add_tokens(
            [
                AddedToken(
                    self._marker[i],
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                    special=False,
                )
                for i, token in tokens.items()
            ]
        )
        self._control_id = {self._tokenizer.token_to_id(marker): i for i, marker in self._marker.items()}
        self.control_ids = frozenset(tokens)

    def encode(self, segments: Iterable[Segment]) -> list[int]:
        """Raises InvalidInput if the tokenizer cannot tell a control token from text here."""
        segments = list(segments)
        text = "".join(self._marker[s] if isinstance(s, int) else without_surrogates(s) for s in segments)
        ids = [self._control_id.get(i, i) for i in encode_text(self._tokenizer, text)]
        if [i for i in ids if i in self.control_ids] != [s for s in segments if isinstance(s, int)]:
            raise InvalidInput(
                "the prompt contains control words of this model, and its tokenizer cannot encode them as "
                "text; leave them out"
            )
        return ids


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids, without those that a tokenizer puts around a text."""
    # As a batch of one: `encode` would hold the interpreter's lock all the time (tokenizers 0.23).
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    return list(encoding.ids)
