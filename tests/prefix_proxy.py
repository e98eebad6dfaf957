"""A reverse proxy that serves a gateway below a path, as nginx or Caddy can. Knows nothing about its API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import httpx2

_HOP_BY_HOP = {b"host", b"connection", b"transfer-encoding", b"content-length", b"date", b"server"}


class PrefixProxy:
    """An ASGI application that forwards `prefix` + path to `path` of the gateway."""

    def __init__(self, prefix: str, gateway_url: str) -> None:
        self._prefix, self._gateway = prefix, gateway_url

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        if not scope["path"].startswith(f"{self._prefix}/"):
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        message = await receive()
        body = message.get("body", b"")
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        headers = [(name, value) for name, value in scope["headers"] if name not in _HOP_BY_HOP]
        url = self._gateway + scope["path"].removeprefix(self._prefix)
        async with (
            httpx2.AsyncClient(timeout=60, trust_env=False, verify=False) as client,
            client.stream(
                scope["method"], url, params=scope["query_string"].decode(), headers=headers, content=body
            ) as response,
        ):
            kept = [(n.lower(), v) for n, v in response.headers.raw if n.lower() not in _HOP_BY_HOP]
            await send({"type": "http.response.start", "status": response.status_code, "headers": kept})
            async for chunk in response.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
