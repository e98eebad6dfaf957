"""Encodes text runs and control token ids together, so that no text is encoded as a control token.

Knows the added tokens of the `tokenizers` library; knows nothing about dialogues or templates.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterable, Mapping

from tokenizers import AddedToken, Tokenizer

from llama.errors import InvalidInput
from llama.text.tokenizer import Segment, without_surrogates

PRIVATE = range(0xF0000, 0xFFFFE)
"""Private-use code points, which have no assigned meaning."""


class ControlMarkers:
    """A copy of a tokenizer in which control words are ordinary text.

    A marker stands for each control token: a string of random private-use characters, which no caller can
    guess, with the token's own rules for surrounding white space. The whole prompt can therefore be encoded
    as one string, as transformers does.
    """

    def __init__(self, tokenizer: Tokenizer, control_words: Mapping[str, int]) -> None:
        added = tokenizer.get_added_tokens_decoder()
        tokens = {i: added.get(i) or AddedToken(word, normalized=False) for word, i in control_words.items()}
        self._tokenizer = copy.deepcopy(tokenizer)
        # `encode_special_tokens` applies only to tokens that are registered as special.
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
        """Encode the segments.

        Raises InvalidInput unless the control tokens in the result are exactly those of the segments.
        """
        segments = list(segments)
        text = "".join(self._marker[s] if isinstance(s, int) else without_surrogates(s) for s in segments)
        ids = [self._control_id.get(i, i) for i in encode_text(self._tokenizer, text)]
        if [i for i in ids if i in self.control_ids] != [s for s in segments if isinstance(s, int)]:
            raise InvalidInput(
                "the prompt contains control words of this model, which its tokenizer cannot encode as text; "
                "remove them from the prompt"
            )
        return ids


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text, without the special tokens that a tokenizer adds around it."""
    # A batch of one, because `encode` does not release the GIL (tokenizers 0.23).
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    return list(encoding.ids)
