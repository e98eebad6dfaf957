"""Text from token ids, piece by piece: Detokenizer, and StopFilter behind it.

Both hold back only what may still change and have no I/O, no threads and no torch inside. They know
a vocabulary as a table of pieces, nothing of the tokenizer that it came from.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SPACE = "\u2581"
_EACH_BYTE = "llama-each-byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """SentencePiece's rule: one U+FFFD for every byte that is not part of a character."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


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


class StopFilter:
    """Cuts a text at the first stop sequence, wherever the pieces of text are cut.

    An Aho-Corasick automaton: after each character its state is the longest end of the text that may
    still become a stop sequence, which is what must be held back. The sequence that ends first wins,
    the longest of those that end together. Time is linear in the text, whatever the number of stops.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._held = ""
        self._state = 0
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match = [0]  # length of the longest stop that ends in this state
        self._fail = [0]
        for stop in stops:
            self._insert(stop)
        self._link()

    def update(self, text: str, *, may_stop: bool = True) -> str:
        """The text that no stop sequence can claim any more; "" once stopped.

        If `may_stop` is false, a stop sequence that ends in `text` is ignored. One that begins here and ends
        in later text still counts.
        """
        if self.stopped:
            return ""
        if len(self._next) == 1:
            return text
        for index, character in enumerate(text):
            self._state = self._step(self._state, character)
            if not (length := self._match[self._state]):
                continue
            if may_stop:
                self.stopped = True
                kept = self._held + text[: index + 1]
                self._held = ""
                return kept[: len(kept) - length]
            while self._state and not self._next[self._state]:  # no longer stop sequence begins like this
                self._state = self._fail[self._state]
        kept = self._held + text
        cut = len(kept) - self._depth[self._state]
        self._held = kept[cut:]
        return kept[:cut]

    def flush(self) -> str:
        """What was held back and turned out to be no stop sequence."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            following = self._next[state].get(character)
            if following is None:
                following = len(self._next)
                self._next[state][character] = following
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._match.append(0)
                self._fail.append(0)
            state = following
        self._match[state] = len(stop)

    def _link(self) -> None:
        """Breadth first, so that the state to fall back to, which is nearer the root, is ready."""
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for character, following in self._next[state].items():
                self._fail[following] = self._step(self._fail[state], character)
                self._match[following] = self._match[following] or self._match[self._fail[following]]
                waiting.append(following)

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(character, 0)
