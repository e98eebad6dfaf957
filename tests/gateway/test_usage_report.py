"""Prices, and usage added up by key, day and model."""

from __future__ import annotations

import sqlite3
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.errors import BadSettings
from llama.gateway.prediction import Outcome, Prediction, PredictionRequest, Status
from llama.gateway.prices import Prices
from llama.gateway.settings import GatewaySettings
from llama.gateway.storage.keys import KeyLimits
from llama.gateway.storage.migrations import MIGRATIONS
from llama.gateway.storage.store import Store
from llama.gateway.storage.usage_table import Tokens, Usage
from llama.gateway.usage_report import Column, report, total

PRICES = Prices(Decimal("0.65"), Decimal("2.75"))
TOKENS = st.integers(min_value=0, max_value=10**9)


def used(key: str, day: int, model: str, input_tokens: int, output_tokens: int) -> Usage:
    return Usage(key, date(2026, 11, day), model, 1, input_tokens, output_tokens, 0.5)


ROWS = [used("ann", 1, "a/b", 100, 10), used("bob", 1, "a/b", 7, 1), used("ann", 2, "a/c", 1000, 0)]


def test_a_million_tokens_cost_the_published_prices() -> None:
    prices = GatewaySettings().prices
    assert prices.of(1_000_000, 0) == Decimal("0.65")
    assert prices.of(0, 1_000_000) == Decimal("2.75")


@given(st.lists(st.tuples(TOKENS, TOKENS)))
def test_the_price_of_a_sum_is_the_sum_of_the_prices(counts: list[tuple[int, int]]) -> None:
    added = PRICES.of(sum(one for one, _ in counts), sum(other for _, other in counts))
    assert added == sum((PRICES.of(*pair) for pair in counts), Decimal(0))


@pytest.mark.parametrize(
    ("by", "lines"),
    [
        ([Column.KEY], {("ann",): 1110, ("bob",): 8}),
        ([Column.DAY], {("2026-11-01",): 118, ("2026-11-02",): 1000}),
        ([Column.MODEL], {("a/b",): 118, ("a/c",): 1000}),
        (
            [Column.KEY, Column.DAY],
            {("ann", "2026-11-01"): 110, ("ann", "2026-11-02"): 1000, ("bob", "2026-11-01"): 8},
        ),
        ([], {(): 1118}),
    ],
)
def test_usage_is_added_up_by_any_columns(by: list[Column], lines: dict[tuple[str, ...], int]) -> None:
    found = report(ROWS, PRICES, by)
    assert {line.of: line.input_tokens + line.output_tokens for line in found} == lines
    assert [line.of for line in found] == sorted(lines)


def test_the_total_is_the_sum_of_the_lines() -> None:
    everything, lines = total(ROWS, PRICES), report(ROWS, PRICES, [Column.KEY])
    assert (everything.predictions, everything.seconds) == (3, 1.5)
    assert everything.price == sum(line.price for line in lines) == PRICES.of(1107, 11)
    assert total([], PRICES).price == 0


@pytest.mark.parametrize("price", ["-1", "cheap", "nan", "inf", "1e30"])
def test_an_impossible_price_is_refused(monkeypatch: pytest.MonkeyPatch, price: str) -> None:
    monkeypatch.setenv("LLAMA_GATEWAY_INPUT_PRICE", price)
    with pytest.raises(BadSettings, match="LLAMA_GATEWAY_INPUT_PRICE"):
        GatewaySettings.from_environment()


def test_usage_is_read_by_key_and_from_a_day_on(tmp_path: Path) -> None:
    store = Store(tmp_path / "gateway.sqlite3")
    for name, day in (("ann", 1), ("bob", 1), ("ann", 2)):
        key = store.keys.find(name) or store.keys.add(name, name)
        prediction = Prediction(PredictionRequest(key.id, {"prompt": "Hi"}, "a/b"))
        prediction.set_created_at(1793491200 + (day - 1) * 86400)  # 2026-11-01 in UTC
        prediction.metrics = {"input_token_count": 5, "output_token_count": 7}
        store.insert([prediction])
        store.finish(prediction, Outcome(Status.CANCELED))
    ann = store.keys.find("ann")
    assert ann is not None
    assert [(row.key, row.day.day) for row in store.usage.rows()] == [("ann", 1), ("bob", 1), ("ann", 2)]
    assert [row.day.day for row in store.usage.rows(key_id=ann.id)] == [1, 2]
    assert [row.key for row in store.usage.rows(since=date(2026, 11, 2))] == ["ann"]
    assert store.usage.tokens(ann.id, date(2026, 11, 1)) == Tokens(10, 14)
    assert store.usage.tokens(ann.id, date(2026, 12, 1)) == Tokens(0, 0)
    assert store.usage.predictions() == 3


def test_a_database_without_budgets_is_upgraded(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sqlite3"
    with sqlite3.connect(path) as old:
        old.executescript(MIGRATIONS[0])
        old.execute("PRAGMA user_version = 1")
        old.execute("INSERT INTO keys VALUES (1, 'ann', 'hash', 'whsec_x', 60, 4, 0, NULL)")
    old.close()
    store = Store(path)
    ann = store.keys.find("ann")
    assert ann is not None
    assert ann.limits == KeyLimits(60, 4, None, None)
    limits = KeyLimits(None, 4, 10, Decimal("0.10"))
    store.keys.set_limits(ann, limits)
    again = store.keys.find("ann")
    assert again is not None
    assert again.limits == limits
