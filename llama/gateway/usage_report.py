"""Adds prices to usage. The page, the command line and `/metrics` show the result.

Knows nothing about how it is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from llama.gateway.prices import Prices
from llama.gateway.storage.usage_table import Usage


@dataclass(frozen=True)
class PricedUsage(Usage):
    """A sum of usage with its price."""

    price: Decimal
    """In dollars, at the current prices."""


def with_prices(usage: Iterable[Usage], prices: Prices) -> list[PricedUsage]:
    """Return the usage with its prices, in the same order."""
    return [PricedUsage(**vars(row), price=prices.of(row.input_tokens, row.output_tokens)) for row in usage]


def total(lines: Sequence[PricedUsage]) -> PricedUsage:
    """Return the sum of all lines."""
    return PricedUsage(
        (),
        sum(line.predictions for line in lines),
        sum(line.input_tokens for line in lines),
        sum(line.output_tokens for line in lines),
        sum(line.seconds for line in lines),
        sum((line.price for line in lines), Decimal(0)),
    )
