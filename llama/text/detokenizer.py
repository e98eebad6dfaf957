"""Text from token ids, piece by piece.

Holds back only what may still change: the bytes of an unfinished character. Knows a vocabulary as a table of
pieces; knows nothing of the tokenizer that it came from.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from llama.text.vocabulary import Vocabulary

_SPACE = "\u2581"
_EACH_BYTE = "llama-each-byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """SentencePiece's rule: one U+FFFD for every byte that is not part of a character."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


class Detokenizer:
    """Joined, the pieces equal the text of all token ids decoded at once; time is linear in them."""

    def __init__(self, vocabulary: Vocabulary, *, continues: bool = False) -> None:
        """`continues`: the ids go on from a begun answer, so the leading space stays."""
        self._pieces = vocabulary.pieces
        errors = _EACH_BYTE if vocabulary.sentencepiece else "replace"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._at_start = vocabulary.sentencepiece and not continues

    def update(self, token_ids: Iterable[int]) -> str:
        """Text that these ids complete; the bytes of an unfinished character wait."""
        return "".join([self._one(self._pieces[token_id]) for token_id in token_ids])

    def flush(self) -> str:
        """What is left at the end: U+FFFD for the bytes of a character that never came."""
        return self._decoder.decode(b"", final=True)

    def _one(self, piece: str | bytes) -> str:
        if isinstance(piece, bytes):
            text = self._decoder.decode(piece)
            # A waiting byte already counts as text: it will come out as something.
            self._at_start = self._at_start and not piece
            return text
        text = self.flush()
        if self._at_start and piece:
            self._at_start = False
            piece = piece.removeprefix(_SPACE)
        return text + piece.replace(_SPACE, " ")
