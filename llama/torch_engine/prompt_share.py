"""How many prompt tokens a step may read while answers are running.

A step reads prompts and then decodes, so a running answer waits for both. The number of prompt tokens is
calculated from the seconds that the latest steps on this machine took. Knows seconds and numbers of tokens;
knows nothing about requests or tensors.
"""

from __future__ import annotations

from llama.engine import PACE
from llama.model import gpu_reserve

MOST_PROMPT_TOKENS = {"cuda": gpu_reserve.MOST_PROMPT_TOKENS, "cpu": 512}
"""The most prompt tokens of a step, by type of device.

On 2 cores of an EPYC, reading a prompt of 128 tokens took 70 ms. If 4, 8 or 16 were read together, each took
64, 63 or 69 ms. With 4, the pause is shorter than with 8.
"""
# Reading may take this many times as long as decoding, so a token takes up to 2.5 times as long as before.
_SLOWDOWN = 1.5
_FEWEST = 16  # tokens; with fewer, reading the weights takes most of the step
_WEIGHT = 0.3  # the weight of the latest step


class PromptShare:
    """Chooses the number of prompt tokens of each step."""

    def __init__(self, most: int) -> None:
        """`most` is the largest number of prompt tokens of a step."""
        self._most = most
        self._decode: float | None = None  # seconds for decoding one token of every running answer
        self._read = self._reading = 0.0  # prompt tokens, and the seconds for them; the latest count most

    def tokens(self, decoding: bool, unread: int) -> int:
        """Return how many prompt tokens the next step may read.

        `decoding` is whether an answer is running, and `unread` is the number of requests without a first
        token. The result grows with the square of `unread`. If the requests are read one after the other, the
        sum of their waiting times also grows with the square.
        """
        if not decoding or self._decode is None or not self._read:
            return self._most
        # A stream hands out tokens at most once per PACE, so a step of that length delays no caller.
        seconds = _SLOWDOWN * max(self._decode, PACE) * unread**2
        return max(_FEWEST, min(round(seconds * self._read / self._reading), self._most))

    def observe_reading(self, tokens: int, seconds: float) -> None:
        """Record how long a step has taken to read this number of prompt tokens."""
        self._read = (1 - _WEIGHT) * self._read + tokens
        self._reading = (1 - _WEIGHT) * self._reading + seconds

    def observe_decoding(self, seconds: float) -> None:
        """Record how long a step has taken to decode."""
        before = seconds if self._decode is None else self._decode
        self._decode = before + _WEIGHT * (seconds - before)
