"""Makes one attempt to deliver a webhook: signs it as Standard Webhooks says, and checks the response.

Bounds how many attempts run at once. Knows nothing about when and how often a webhook is sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Protocol
from weakref import WeakValueDictionary

import httpx2
from standardwebhooks import Webhook as Signer

from llama.gateway.prediction import Prediction
from llama.gateway.storage.keys import Key
from llama.gateway.webhooks.outgoing import AddressRefused

logger = logging.getLogger(__name__)

_GONE = 410


class Sender(Protocol):
    async def post(self, url: str, content: bytes, headers: Mapping[str, str]) -> int: ...


class Delivery:
    """Sends webhooks through a sender, such as `Outgoing`. A slow receiver gets at most `at_once_per_host`
    slots of its key, so that it does not delay other receivers. A key can name any number of hosts, so it
    gets at most `at_once_per_key` slots."""

    def __init__(
        self,
        sender: Sender,
        key_of: Callable[[int], Key | None],
        at_once: int = 64,
        at_once_per_key: int = 16,
        at_once_per_host: int = 8,
    ) -> None:
        """`key_of` returns the key with an id; its secret signs the webhooks of its predictions."""
        self._sender, self._key_of = sender, key_of
        self._slots = asyncio.Semaphore(at_once)
        self._per_key, self._per_host = at_once_per_key, at_once_per_host
        self._slots_of: WeakValueDictionary[tuple[int, str], asyncio.Semaphore] = WeakValueDictionary()
        """By key and host; by key and "" for all of the key's hosts."""

    @asynccontextmanager
    async def slot(self, prediction: Prediction) -> AsyncIterator[None]:
        """Wait until an attempt for this prediction may run."""
        key_id, host = prediction.request.key_id, _host_of(prediction)
        of_host = self._slots_of.setdefault((key_id, host), asyncio.Semaphore(self._per_host))
        of_key = self._slots_of.setdefault((key_id, ""), asyncio.Semaphore(self._per_key))
        async with of_host, of_key, self._slots:
            yield

    async def attempt(self, prediction: Prediction, message_id: str, body: bytes) -> bool:
        """Send a body to the prediction's webhook. Returns False if another attempt may succeed."""
        webhook, key = prediction.request.webhook, self._key_of(prediction.request.key_id)
        assert webhook is not None
        assert key is not None, "keys are never deleted"
        headers = _headers(key.webhook_secret, message_id, body)
        try:
            status = await self._sender.post(webhook.url, body, headers)
        except (AddressRefused, ValueError) as error:
            return self._failed(prediction, str(error), again=False)
        except (OSError, TimeoutError, httpx2.HTTPError) as error:
            return self._failed(prediction, type(error).__name__, again=True)
        if 200 <= status < 300:
            return True
        return self._failed(prediction, f"status {status}", again=status != _GONE)

    def _failed(self, prediction: Prediction, reason: str, *, again: bool) -> bool:
        # A URL's path and query may be secrets, so only the host is logged.
        host = _host_of(prediction)
        logger.info("the webhook of prediction %s to %s failed: %s", prediction.id, host, reason)
        return not again


def _host_of(prediction: Prediction) -> str:
    assert prediction.request.webhook is not None
    return httpx2.URL(prediction.request.webhook.url).host


def _headers(secret: str, message_id: str, body: bytes) -> dict[str, str]:
    now = datetime.now(UTC)
    return {
        "content-type": "application/json",
        "user-agent": "llama-2-70b-chat",
        "webhook-id": message_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Signer(secret).sign(message_id, now, body.decode()),
    }
