"""`GET /metrics`: the metrics of the gateway for Prometheus, which name all keys and servers.

They need no key on a gateway that needs none. Otherwise they need a key of their own, because clients must
not see each other's names.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Iterable

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from llama.gateway.access.auth import unauthenticated
from llama.gateway.gateway import Gateway
from llama.gateway.metrics.usage import COLUMNS, Scrape, nothing_used
from llama.gateway.problems import Problem
from llama.gateway.routes.dependencies import CurrentGateway
from llama.gateway.storage.keys import hash_of, same
from llama.gateway.storage.store import Store
from llama.gateway.storage.usage_table import Usage
from llama.gateway.usage_report import PricedUsage, with_prices

logger = logging.getLogger(__name__)

_DATABASE_TIMEOUT = 5.0  # seconds; Prometheus waits for 10 by default

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request, gateway: CurrentGateway) -> Response:
    if not await gateway.keys.is_open():
        _check_key(gateway, request.headers.get("authorization", ""))
    scrape = Scrape(gateway.metrics.registry, await _usage(gateway))
    encode, content_type = _encoder(request.headers.get("accept", ""))
    return Response(encode(scrape), headers={"Content-Type": content_type})


def _encoder(accept: str) -> tuple[Callable[[Collector], bytes], str]:
    try:
        return choose_encoder(accept)
    except TypeError:  # a version of a format that is not a number
        return choose_encoder("")


def _check_key(gateway: Gateway, authorization: str) -> None:
    expected = gateway.settings.metrics_key
    if expected is None:
        raise Problem(
            403,
            "Forbidden",
            "The metrics name all keys, so they need a key of their own. Set LLAMA_GATEWAY_METRICS_KEY, and "
            "send its value as `Authorization: Bearer ...`.",
            code="forbidden",
        )
    scheme, _, secret = authorization.strip().partition(" ")
    known = same(hash_of(secret.strip()), hash_of(expected.get_secret_value()))
    if scheme.lower() != "bearer" or not known:
        raise unauthenticated(
            "The metrics need the value of LLAMA_GATEWAY_METRICS_KEY, sent as `Authorization: Bearer ...`. "
            "The keys of clients are refused."
        )


async def _usage(gateway: Gateway) -> list[PricedUsage] | None:
    """The usage of all keys; None if the database cannot be read."""

    def sums(store: Store) -> Iterable[Usage]:
        in_use = [stored.key.name for stored in store.keys.all() if stored.revoked_at is None]
        unused = (nothing_used(name, gateway.settings.model) for name in in_use)
        return {usage.of: usage for usage in (*unused, *store.usage.sums(COLUMNS))}.values()

    try:
        async with asyncio.timeout(_DATABASE_TIMEOUT):
            found = await gateway.storage.run(sums)
    except (sqlite3.Error, TimeoutError) as error:
        logger.error("the metrics lack the usage, because the database cannot be read: %r", error)
        return None
    return with_prices(found, gateway.settings.prices)
