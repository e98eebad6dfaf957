"""What each token id adds to a text, as a table, and how to read it from a fast tokenizer.

Knows the two ways in which fast tokenizers spell text (byte-level, and like SentencePiece); knows nothing of
dialogues or of how text is put together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama.errors import BadTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer


@dataclass(frozen=True)
class Vocabulary:
    """What each token id adds to a text.

    A `str` is whole by itself, spelt as SentencePiece does (U+2581 for a space), and ends a run of
    bytes before it; `bytes` are a part of UTF-8 text that may end inside a character. A control token
    adds nothing: `""` in a SentencePiece vocabulary, where it ends a run of bytes as well, `b""` in a
    byte-level one, where it does not.
    """

    pieces: Sequence[str | bytes]
    sentencepiece: bool
    """SentencePiece's rules: the text's first space is the tokenizer's own and is taken off again,
    and a byte that is no character becomes one U+FFFD. Else: UTF-8 with replacement."""


def read_fast_vocabulary(backend: FastTokenizer) -> Vocabulary:
    """Raises BadTokenizer when the pieces are spelt in a way not known here."""
    decoder = json.dumps(json.loads(backend.to_str())["decoder"])
    byte_level = "ByteLevel" in decoder
    if not byte_level and "ByteFallback" not in decoder:
        raise BadTokenizer("tokenizer.json is neither byte-level nor SentencePiece-like; use another model")
    vocabulary, added = backend.get_vocab(), backend.get_added_tokens_decoder()
    pieces: list[str | bytes] = [b"" if byte_level else ""] * (max(vocabulary.values()) + 1)
    byte_of = _byte_of_character()
    try:
        for piece, token_id in vocabulary.items():
            if token_id in added:
                text = "" if added[token_id].special else added[token_id].content
                pieces[token_id] = text.encode() if byte_level else text
            elif byte_level:
                pieces[token_id] = bytes(byte_of[character] for character in piece)
            else:
                pieces[token_id] = _byte_fallback_piece(piece)
    except KeyError as error:
        raise BadTokenizer(f"tokenizer.json is not byte-level throughout ({error}); copy it again") from error
    return Vocabulary(pieces, sentencepiece=not byte_level)


def _byte_of_character() -> dict[str, int]:
    """How a byte-level vocabulary spells bytes as printable characters, read backwards."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def _byte_fallback_piece(piece: str) -> str | bytes:
    match = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes([int(match[1], 16)]) if match else piece
