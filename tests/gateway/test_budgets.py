"""Monthly budgets of keys: what is refused, in which shape, and what still runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from gateways import MODEL, Gateway
from server_clients import until

from benchmarks.fake_cog import FakeCog, Script
from llama.gateway.access.budgets import Budgets, Spent
from llama.gateway.prediction import Outcome, Prediction, PredictionRequest, Status
from llama.gateway.prices import Prices
from llama.gateway.storage.keys import Key, KeyLimits
from llama.gateway.storage.storage import Storage

QUESTION: Any = [{"role": "user", "content": "Hello"}]
ANSWER = [f" word{number}" for number in range(20)]
"""With the prompt "Hello", an answer takes 1 + 20 tokens."""


@pytest.fixture
def limited(gateway: Gateway, cog: FakeCog) -> httpx2.Client:
    """A client whose key may use 30 tokens, of which it has used 21."""
    cog.rules.script = Script(ANSWER)
    client = gateway.client_of(gateway.add_key("limited", monthly_tokens=30))
    assert gateway.create(client=client, prefer="wait")["status"] == "succeeded"
    return client


def post(client: httpx2.Client) -> httpx2.Response:
    return client.post(f"/v1/models/{MODEL}/predictions", json={"input": {"prompt": "Hello"}})


def test_a_key_may_exceed_its_budget_with_its_last_prediction_only(
    gateway: Gateway, limited: httpx2.Client, cog: FakeCog
) -> None:
    assert gateway.create(client=limited, prefer="wait")["status"] == "succeeded"
    refused = post(limited)
    assert refused.status_code == 402
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json() == {
        "title": "Insufficient credit",
        "detail": "The monthly budget of this key is used up: it has used 42 of its 30 tokens of this month. "
        "Wait for the first day of the next month (UTC), or ask the operator of the gateway for a larger "
        "budget.",
        "status": 402,
    }
    assert len(cog.predictions) == 2
    assert gateway.create(prefer="wait")["status"] == "succeeded"  # another key


def test_openais_client_gets_its_own_error_and_does_not_try_again(
    gateway: Gateway, limited: httpx2.Client
) -> None:
    gateway.create(client=limited, prefer="wait")
    attempts: list[httpx2.Request] = []
    refused = limited.post("/v1/chat/completions", json={"model": MODEL, "messages": QUESTION})
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"], error["param"]) == (
        "insufficient_quota",
        "insufficient_quota",
        None,
    )
    key = limited.headers["Authorization"].removeprefix("Bearer ")
    with (
        httpx2.Client(event_hooks={"request": [attempts.append]}, trust_env=False) as http,
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, http_client=http, max_retries=2) as client,
        pytest.raises(openai.RateLimitError) as raised,
    ):
        client.chat.completions.create(model=MODEL, messages=QUESTION)
    assert raised.value.code == "insufficient_quota"
    assert len(attempts) == 1


def test_a_budget_in_dollars_counts_input_and_output_at_their_prices(
    cog: FakeCog, gateways: Callable[..., Gateway]
) -> None:
    gateway = gateways(cog.url, input_price="1000", output_price="2000")  # dollars per million tokens
    cog.rules.script = Script(ANSWER)
    client = gateway.client_of(gateway.add_key("limited", monthly_dollars=Decimal("0.041")))
    assert gateway.create(client=client, prefer="wait")["status"] == "succeeded"  # costs 0.001 + 0.040
    assert "$0.041000 of its $0.041" in post(client).json()["detail"]


def test_the_tokens_of_running_predictions_count(
    gateway: Gateway, limited: httpx2.Client, cog: FakeCog
) -> None:
    cog.rules.script = Script(ANSWER, hold_after=8)
    other = gateway.create()  # with a key that has no budget; its 9 tokens must not count
    until(lambda: len(gateway.get(other)["output"] or "") == 8)
    running = gateway.create(client=limited)
    until(lambda: post(limited).status_code == 402)  # 21 + 1 + 8 tokens
    cog.release()
    assert wait_for(limited, running)["status"] == "succeeded"


def test_waiting_predictions_fail_when_the_running_ones_have_used_the_budget_up(
    cog: FakeCog, gateways: Callable[..., Gateway]
) -> None:
    gateway = gateways(cog.url, places=1)
    cog.rules.script = Script(ANSWER, gap=0.1, hold_after=10)
    client = gateway.client_of(gateway.add_key("limited", monthly_tokens=11))
    running, waiting = (gateway.create(client=client) for _ in range(2))
    ended = wait_for(client, waiting)
    assert ended["status"] == "failed"
    assert ended["error"].startswith("E4004 BudgetUsedUp: the monthly budget of this key is used up: it has ")
    cog.release()
    assert wait_for(client, running)["status"] == "succeeded"
    assert len(cog.predictions) == 1


def wait_for(client: httpx2.Client, prediction: dict[str, Any]) -> dict[str, Any]:
    def get() -> dict[str, Any]:
        body: dict[str, Any] = client.get(f"/v1/predictions/{prediction['id']}").json()
        return body

    until(lambda: get()["status"] in ("succeeded", "failed", "canceled"))
    return get()


def test_a_larger_budget_applies_at_once(gateway: Gateway, limited: httpx2.Client) -> None:
    gateway.create(client=limited, prefer="wait")
    assert post(limited).status_code == 402
    gateway.set_limits("limited", monthly_tokens=1000)
    assert post(limited).status_code == 201


def test_a_new_month_begins_with_the_whole_budget(tmp_path: Path) -> None:
    async def scene(storage: Storage) -> None:
        limits = KeyLimits(monthly_tokens=10)
        key = await storage.run(lambda store: store.keys.add("ann", "hash", limits))
        prediction = Prediction(PredictionRequest(key.id, {"prompt": "Hi"}, "a/b"))
        prediction.set_created_at(1793491199)  # a second before November 2026 in UTC
        prediction.metrics = {"input_token_count": 5, "output_token_count": 7}
        await storage.run(lambda store: store.insert([prediction]))

        async def tokens(today: date, unfinished: list[Prediction]) -> int:
            budgets = Budgets(storage, Prices(Decimal(1), Decimal(1)), lambda: today)
            return (await budgets.spent(key, lambda: unfinished)).tokens

        october, november = date(2026, 10, 31), date(2026, 11, 1)
        assert (await tokens(october, [prediction]), await tokens(november, [prediction])) == (12, 0)
        await storage.run(lambda store: store.finish(prediction, Outcome(Status.SUCCEEDED)))
        assert (await tokens(october, []), await tokens(november, [])) == (12, 0)

    storage = Storage(tmp_path / "gateway.sqlite3")
    try:
        asyncio.run(scene(storage))
    finally:
        storage.close()


@pytest.mark.parametrize(
    ("limits", "used_up"),
    [
        (KeyLimits(), False),
        (KeyLimits(monthly_tokens=101), False),
        (KeyLimits(monthly_tokens=100), True),
        (KeyLimits(monthly_dollars=Decimal("0.51")), False),
        (KeyLimits(monthly_dollars=Decimal("0.5")), True),
        (KeyLimits(monthly_tokens=1000, monthly_dollars=Decimal("0.4")), True),
    ],
)
def test_a_budget_is_used_up_when_it_is_reached(limits: KeyLimits, used_up: bool) -> None:
    excess = Spent(100, Decimal("0.5")).excess(Key(1, "ann", limits))
    assert (excess is not None) is used_up


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ("1e3", "it has used $1000.250000 of its $1000 of this month"),
        ("1e-5", "it has used $1000.250000 of its $0.00001 of this month"),
        ("20.50", "it has used $1000.250000 of its $20.50 of this month"),
    ],
)
def test_a_budget_in_dollars_is_shown_without_an_exponent(budget: str, text: str) -> None:
    key = Key(1, "ann", KeyLimits(monthly_dollars=Decimal(budget)))
    assert Spent(1, Decimal("1000.25")).excess(key) == text
