"""Cuts a streamed answer at the first stop sequence.

Holds back only text that may still become a stop sequence. Knows text; knows nothing about tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopFilter:
    """Cuts a streamed text at the first stop sequence, even if the sequence spans several pieces.

    An Aho-Corasick automaton. Its state after each character is the longest suffix of the text that is the
    beginning of a stop sequence, and this suffix is held back. The stop sequence that ends first wins; of
    several that end at the same character, the longest wins. Time is linear in the length of the text,
    regardless of the number of stop sequences.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._held = ""
        self._state = 0
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match = [0]  # length of the longest stop sequence that ends in this state
        self._fail = [0]
        for stop in stops:
            self._insert(stop)
        self._link()

    def update(self, text: str, *, may_stop: bool = True) -> str:
        """Return the text that can no longer be part of a stop sequence.

        After a stop sequence has been found, later calls return "".

        If `may_stop` is false, a stop sequence that ends in `text` is ignored. A stop sequence that begins in
        `text` and ends in later text still counts.
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
            while (
                self._state and not self._next[self._state]
            ):  # there is no longer sequence that begins with this one
                self._state = self._fail[self._state]
        kept = self._held + text
        cut = len(kept) - self._depth[self._state]
        self._held = kept[cut:]
        return kept[:cut]

    def flush(self) -> str:
        """Return the text that is still held back, because it did not become a stop sequence."""
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
        """Set the fallback of every state, breadth first: a fallback is nearer to the root than its state."""
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
