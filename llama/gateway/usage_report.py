"""Adds up usage by key, day or model, and puts a price on it. The page, the command line and `/metrics` show
these numbers.

Knows numbers. Knows nothing about how they are shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from llama.gateway.prices import Prices
from llama.gateway.storage.usage_table import Usage


class Column(StrEnum):
    """What usage can be added up by."""

    KEY = "key"
    DAY = "day"
    MODEL = "model"


@dataclass(frozen=True)
class Line:
    """The sum of some usage."""

    of: tuple[str, ...]
    """The values of the columns that the line is for, such as a key's name and a day."""
    predictions: int
    input_tokens: int
    output_tokens: int
    seconds: float
    price: Decimal
    """In dollars, at the prices of now."""


def report(usage: Iterable[Usage], prices: Prices, by: Sequence[Column]) -> list[Line]:
    """Return a line for each combination of values of the columns `by`, in the order of these values."""
    groups = dict[tuple[str, ...], list[Usage]]()
    for row in usage:
        groups.setdefault(tuple(str(getattr(row, column.value)) for column in by), []).append(row)
    return [_line(of, groups[of], prices) for of in sorted(groups)]


def total(usage: Iterable[Usage], prices: Prices) -> Line:
    """Return the sum of all."""
    return _line((), list(usage), prices)


def _line(of: tuple[str, ...], usage: Sequence[Usage], prices: Prices) -> Line:
    input_tokens = sum(row.input_tokens for row in usage)
    output_tokens = sum(row.output_tokens for row in usage)
    return Line(
        of,
        sum(row.predictions for row in usage),
        input_tokens,
        output_tokens,
        sum(row.seconds for row in usage),
        prices.of(input_tokens, output_tokens),
    )
