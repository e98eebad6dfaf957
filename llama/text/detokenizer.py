"""Decodes a stream of token ids into text.

Holds back only what may still change: the bytes of an incomplete character. Knows the vocabulary as a table
of pieces; knows nothing about the tokenizer that it came from.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from llama.text.vocabulary import Vocabulary

_SPACE = "\u2581"
_EACH_BYTE = "llama-each-byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler with SentencePiece's rule: one U+FFFD for every byte of an invalid sequence."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


class Detokenizer:
    """Incremental decoder from token ids to text.

    The concatenated output equals the text of all token ids decoded at once. Total time is linear in the
    number of tokens.
    """

    def __init__(self, vocabulary: Vocabulary, *, continues: bool = False) -> None:
        """`continues`: the ids continue a partial answer, so the leading space is kept."""
        self._pieces = vocabulary.pieces
        errors = _EACH_BYTE if vocabulary.sentencepiece else "replace"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._at_start = vocabulary.sentencepiece and not continues

    def update(self, token_ids: Iterable[int]) -> str:
        """Return the text that these ids complete, and hold back the bytes of an incomplete character."""
        return "".join([self._one(self._pieces[token_id]) for token_id in token_ids])

    def flush(self) -> str:
        """Return the rest at the end of the answer: U+FFFD for the bytes of an incomplete character."""
        return self._decoder.decode(b"", final=True)

    def _one(self, piece: str | bytes) -> str:
        if isinstance(piece, bytes):
            text = self._decoder.decode(piece)
            # A byte that is held back counts as text: it will become a character or U+FFFD.
            self._at_start = self._at_start and not piece
            return text
        text = self.flush()
        if self._at_start and piece:
            self._at_start = False
            piece = piece.removeprefix(_SPACE)
        return text + piece.replace(_SPACE, " ")
