"""What tokens cost. Knows nothing about keys or time."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

_MILLION = 1_000_000


@dataclass(frozen=True)
class Prices:
    """Dollars per million tokens."""

    input: Decimal
    output: Decimal

    def of(self, input_tokens: int, output_tokens: int) -> Decimal:
        """Return what these tokens cost, in dollars. It is exact, so the price of a sum is the sum of the
        prices."""
        return (self.input * input_tokens + self.output * output_tokens) / _MILLION
