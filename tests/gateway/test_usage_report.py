"""Prices, and usage added up by key, day and model."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.errors import BadSettings
from llama.gateway.prediction import Outcome, Prediction, PredictionRequest, Status, Tokens
from llama.gateway.prices import Prices
from llama.gateway.settings import GatewaySettings
from llama.gateway.storage.keys import KeyLimits
from llama.gateway.storage.migrations import MIGRATIONS
from llama.gateway.storage.store import Store
from llama.gateway.storage.usage_table import Column
from llama.gateway.usage_report import total, with_prices

PRICES = Prices(Decimal("0.65"), Decimal("2.75"))
TOKENS = st.integers(min_value=0, max_value=10**9)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A database with the predictions of two keys on two days, with two models."""
    store = Store(tmp_path / "gateway.sqlite3")
    for name, day, model, input_tokens, output_tokens in (
        ("bob", 1, "a/b", 7, 1),
        ("ann", 2, "a/c", 1000, 0),
        ("ann", 1, "a/b", 60, 4),
        ("ann", 1, "a/b", 40, 6),
    ):
        key = store.keys.find(name) or store.keys.add(name, name)
        prediction = Prediction(PredictionRequest(key.id, {"prompt": "Hi"}, model))
        prediction.set_created_at(1793491200 + (day - 1) * 86400)  # 2026-11-01 in UTC
        prediction.started_at = prediction.created_at + 1
        prediction.metrics = {"input_token_count": input_tokens, "output_token_count": output_tokens}
        store.insert([prediction])
        store.finish(prediction, Outcome(Status.CANCELED, ended_at=prediction.created_at + 1.5))
    yield store
    store.close()


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
    ],
)
def test_usage_is_added_up_by_any_columns(
    store: Store, by: list[Column], lines: dict[tuple[str, ...], int]
) -> None:
    found = store.usage.sums(by)
    assert {usage.of: usage.input_tokens + usage.output_tokens for usage in found} == lines
    assert [usage.of for usage in found] == sorted(lines)


def test_the_total_is_the_sum_of_the_lines(store: Store) -> None:
    lines = with_prices(store.usage.sums([Column.KEY]), PRICES)
    assert [line.price for line in lines] == [PRICES.of(1100, 10), PRICES.of(7, 1)]
    everything = total(lines)
    assert (everything.predictions, everything.seconds) == (4, 2.0)
    assert everything.price == PRICES.of(1107, 11)
    assert total([]).price == 0


@pytest.mark.parametrize("price", ["-1", "cheap", "nan", "inf", "1e30"])
def test_an_impossible_price_is_refused(monkeypatch: pytest.MonkeyPatch, price: str) -> None:
    monkeypatch.setenv("LLAMA_GATEWAY_INPUT_PRICE", price)
    with pytest.raises(BadSettings, match="LLAMA_GATEWAY_INPUT_PRICE"):
        GatewaySettings.from_environment()


def test_usage_is_read_by_key_and_from_a_day_on(store: Store) -> None:
    ann = store.keys.find("ann")
    assert ann is not None
    by = [Column.KEY, Column.DAY]
    assert [usage.of[1] for usage in store.usage.sums(by, key_id=ann.id)] == ["2026-11-01", "2026-11-02"]
    assert [usage.of for usage in store.usage.sums(by, since=date(2026, 11, 2))] == [("ann", "2026-11-02")]
    assert store.usage.sums(by, since=date(2026, 12, 1)) == []
    assert store.usage.tokens(ann.id, date(2026, 11, 1)) == Tokens(1100, 10)
    assert store.usage.tokens(ann.id, date(2026, 12, 1)) == Tokens(0, 0)
    assert store.usage.predictions() == 4


def test_keys_of_the_same_name_are_added_up(store: Store) -> None:
    store.keys.revoke("ann")
    ann = store.keys.add("ann", "another hash")
    prediction = Prediction(PredictionRequest(ann.id, {"prompt": "Hi"}, "a/b"))
    store.insert([prediction])
    store.finish(prediction, Outcome(Status.SUCCEEDED))
    assert [(usage.of, usage.predictions) for usage in store.usage.sums([Column.KEY])] == [
        (("ann",), 4),
        (("bob",), 1),
    ]


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
