"""A table of the text that each token id stands for, and how to read it from a fast tokenizer.

Knows the two kinds of fast tokenizers, byte-level and SentencePiece-like; knows nothing about dialogues or
about how text is assembled from pieces.
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
    """The piece of text that each token id stands for.

    - A `str` is complete text in SentencePiece's notation, with U+2581 for a space. It ends a run of bytes.
    - `bytes` are UTF-8 text that may end inside a character.
    - A control token stands for no text. It is `""` in a SentencePiece vocabulary, where it also ends a run
      of bytes, and `b""` in a byte-level one, where it does not.
    """

    pieces: Sequence[str | bytes]
    sentencepiece: bool
    """Whether to decode by SentencePiece's rules: the first space of a text is dropped, because the tokenizer
    added it, and each invalid byte becomes one U+FFFD. Otherwise, text is UTF-8 with replacement."""


def read_fast_vocabulary(backend: FastTokenizer) -> Vocabulary:
    """Read the vocabulary of a fast tokenizer.

    Raises BadTokenizer if it is neither byte-level nor SentencePiece-like.
    """
    decoder = json.dumps(json.loads(backend.to_str())["decoder"])
    byte_level = "ByteLevel" in decoder
    if not byte_level and "ByteFallback" not in decoder:
        raise BadTokenizer(
            "tokenizer.json is neither a byte-level nor a SentencePiece-like tokenizer; use another model"
        )
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
        raise BadTokenizer(
            f"tokenizer.json is byte-level, but one of its pieces contains {error}, which stands for no "
            "byte; copy the file again"
        ) from error
    return Vocabulary(pieces, sentencepiece=not byte_level)


def _byte_of_character() -> dict[str, int]:
    """The byte that each printable character of a byte-level vocabulary stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def _byte_fallback_piece(piece: str) -> str | bytes:
    match = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes([int(match[1], 16)]) if match else piece
