"""How many prompt tokens a step may read while answers are running.

A step reads prompts and then decodes, so a running answer waits for both. The number of prompt tokens is
calculated from the seconds that the latest steps on this machine took. Knows seconds and numbers of tokens;
knows nothing about requests or tensors.
"""

from __future__ import annotations

from llama.engine import PACE

# Reading may take this many times as long as decoding, so a token takes up to 2.5 times as long as before.
_SLOWDOWN = 1.5
_FEWEST = 16  # tokens; with fewer, reading the weights takes most of the step
_WEIGHT = 0.3  # the weight of the latest step in the averages


class PromptShare:
    """Chooses the number of prompt tokens of each step."""

    def __init__(self, most: int) -> None:
        """`most` is the largest number of prompt tokens of a step."""
        self._most = most
        self._decode: float | None = None  # seconds for decoding one token of every running answer
        self._per_token: float | None = None  # seconds for reading one prompt token

    def tokens(self, decoding: bool, unread: int) -> int:
        """Return how many prompt tokens the next step may read.

        `decoding` is whether an answer is running, and `unread` is the number of requests without a first
        token. The result grows with the square of `unread`. If the requests are read one after the other, the
        sum of their waiting times also grows with the square.
        """
        if not decoding or self._decode is None or self._per_token is None:
            return self._most
        # A stream hands out tokens at most once per PACE, so nobody sees that a faster step becomes that long.
        reading = _SLOWDOWN * max(self._decode, PACE) * unread**2
        tokens = reading / self._per_token
        return max(_FEWEST, min(int(tokens), self._most))

    def observe_reading(self, tokens: int, seconds: float) -> None:
        """Record how long a step has taken to read this number of prompt tokens."""
        self._per_token = _average(self._per_token, seconds / tokens)

    def observe_decoding(self, seconds: float) -> None:
        """Record how long a step has taken to decode."""
        self._decode = _average(self._decode, seconds)


def _average(average: float | None, latest: float) -> float:
    return latest if average is None else average + _WEIGHT * (latest - average)
