"""The API, the command `usage`, the page and `/metrics` show the same tokens and prices.

Three keys create 500 predictions, which succeed, fail, are cancelled, or lose their client.
"""

from __future__ import annotations

import asyncio
import csv
import io
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx2
from gateways import MODEL, Gateway
from scrapes import METRICS_KEY, by_first_word, chat, scrape
from server_clients import Body, until
from typer.testing import CliRunner

from benchmarks.fake_cog import FakeCog, Script
from llama.cli.main import app

TOTAL = 500
PIECES = [f" word{number}" for number in range(6)]
PRICES = {"input_price": "0.65", "output_price": "2.75"}
SCRIPTS = {
    "succeed": Script(PIECES),
    "fail": Script(PIECES[:3], error="E1000 InvalidInput: no"),
    "refuse": Script((), error="E1001 PromptRequired: prompt is blank"),
    "wait": Script(PIECES, gap=0.2),
}
WAYS = ("succeed", "fail", "refuse", "cancel", "chat", "chat_stream", "leave", "succeed")


async def send(client: httpx2.AsyncClient, way: str, number: int) -> None:
    """Send one request in one of the ways in which clients use a gateway, and wait for its end."""
    words = " word" * (number % 7)
    if way in ("chat", "chat_stream"):
        body = chat(f"succeed{words}", stream=way == "chat_stream")
        (await client.post("/v1/chat/completions", json=body)).raise_for_status()
    elif way == "leave":
        body = chat(f"wait{words}", stream=True)
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            await anext(response.aiter_bytes())
    elif way == "cancel":
        created = await create(client, f"wait{words}", "wait=1" if number % 2 else "respond-async")
        (await client.post(f"/v1/predictions/{created['id']}/cancel")).raise_for_status()
    else:
        await create(client, f"{way}{words}", "wait")


async def create(client: httpx2.AsyncClient, prompt: str, prefer: str) -> Body:
    response = await client.post(
        f"/v1/models/{MODEL}/predictions", json={"input": {"prompt": prompt}}, headers={"Prefer": prefer}
    )
    response.raise_for_status()
    body: Body = response.json()
    return body


@asynccontextmanager
async def client_of(url: str, key: str) -> AsyncIterator[httpx2.AsyncClient]:
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False) as client:
        yield client


async def send_all(url: str, keys: Mapping[str, str]) -> None:
    at_once = asyncio.Semaphore(40)

    async def one(client: httpx2.AsyncClient, number: int) -> None:
        async with at_once:
            await send(client, WAYS[number % len(WAYS)], number)

    async def of_key(key: str, first: int) -> None:
        async with client_of(url, key) as client:
            await asyncio.gather(*(one(client, number) for number in range(first, TOTAL, len(keys))))

    await asyncio.gather(*(of_key(key, first) for first, key in enumerate(keys.values())))


def told(gateway: Gateway, key: str) -> list[Body]:
    """All predictions of a key as the API shows them."""
    found: list[Body] = []
    with gateway.client_of(key) as client:
        url = "/v1/predictions"
        while url:
            page = client.get(url).json()
            found += page["results"]
            url = page["next"]
    return found


def sums(predictions: list[Body]) -> tuple[int, int, int, Decimal]:
    """Predictions, input tokens, output tokens and dollars."""
    metrics = [prediction["metrics"] for prediction in predictions]
    input_tokens = sum(int(m.get("input_token_count", 0)) for m in metrics)
    output_tokens = sum(int(m.get("output_token_count", 0)) for m in metrics)
    dollars = (input_tokens * Decimal("0.65") + output_tokens * Decimal("2.75")) / 1_000_000
    return len(predictions), input_tokens, output_tokens, dollars


def in_usage(database: Path) -> dict[str, tuple[int, int, int, Decimal]]:
    shown = CliRunner().invoke(app, ["usage", "--csv"], env={"LLAMA_GATEWAY_DATABASE": str(database)})
    return {
        row["key"]: (
            int(row["predictions"]),
            int(row["input_tokens"]),
            int(row["output_tokens"]),
            Decimal(row["dollars"]),
        )
        for row in csv.DictReader(io.StringIO(shown.stdout))
    }


def on_the_page(gateway: Gateway, key: str) -> tuple[int, int, int, Decimal]:
    with gateway.client_of(key) as client:
        total: dict[str, Any] = client.get("/page/usage").json()["total"]
    return (
        total["predictions"],
        total["input_tokens"],
        total["output_tokens"],
        Decimal(str(total["price"])).quantize(Decimal("1e-12")).normalize(),
    )


def in_metrics(gateway: Gateway) -> dict[str, tuple[int, int, int, Decimal]]:
    found = scrape(gateway)

    def value(name: str, key: str) -> float:
        return found.value(f"usage_{name}_total", key=key, model=MODEL) or 0.0

    return {
        key: (
            int(value("predictions", key)),
            int(value("input_tokens", key)),
            int(value("output_tokens", key)),
            Decimal(value("dollars", key)).quantize(Decimal("1e-12")).normalize(),
        )
        for key in found.labels("usage_predictions_total", "key")
        if value("predictions", key)
    }


def test_tokens_and_prices_agree_everywhere(gateways: Callable[..., Gateway]) -> None:
    with FakeCog(by_first_word(SCRIPTS)) as cog, FakeCog(by_first_word(SCRIPTS)) as other:
        gateway = gateways(cog.url, other.url, metrics_key=METRICS_KEY, **PRICES)
        keys = {name: gateway.add_key(name) for name in ("ann", "bob", "eve")}
        asyncio.run(send_all(gateway.url, keys))
        until(lambda: not gateway.inside.predictions.unfinished())
        predictions = {name: told(gateway, key) for name, key in keys.items()}
        expected = {name: sums(found) for name, found in predictions.items()}

        statuses = Counter(p["status"] for found in predictions.values() for p in found)
        assert statuses.total() == TOTAL
        assert all(statuses[status] > TOTAL / 10 for status in ("succeeded", "failed", "canceled"))
        cancelled = [p for found in predictions.values() for p in found if p["status"] == "canceled"]
        assert any(p["metrics"].get("output_token_count") for p in cancelled)

        assert in_usage(gateway.settings.database) == expected
        assert {name: on_the_page(gateway, key) for name, key in keys.items()} == expected
        assert in_metrics(gateway) == expected
