"""What a browser sends to a gateway's page, and what the tests need to inspect sessions.

All requests are real HTTP. Knows headers and cookies; knows nothing about the page's contents.
"""

from __future__ import annotations

import http.client
from contextlib import closing
from pathlib import Path

import httpx2
from gateways import KEY, Gateway


def browser(gateway: Gateway, key: str | None = KEY) -> httpx2.Client:
    """Return a client that sends what the gateway's own page sends, logged in with this key or not at all."""
    client = gateway.client_of(None)
    client.headers["origin"] = gateway.url
    if key is not None:
        response = client.post("/page/login", json={"key": key})
        assert response.status_code == 204, response.text
    return client


def cookie_of(client: httpx2.Client) -> tuple[str, str]:
    """The name and the value of a browser's only cookie."""
    (cookie,) = client.cookies.jar
    return cookie.name, cookie.value or ""


def replace_cookie(client: httpx2.Client, name: str, value: str) -> None:
    """Give a browser this cookie only."""
    client.cookies.clear()
    client.cookies.set(name, value)


def stored_secret(gateway: Gateway) -> str:
    """What the gateway signs its sessions with."""
    return Path(f"{gateway.settings.database}.session-secret").read_text()


def get_exactly(gateway: Gateway, path: str) -> http.client.HTTPResponse:
    """Request a path without making it shorter first, as other clients do."""
    connection = http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=60)
    with closing(connection):
        connection.putrequest("GET", path)
        connection.endheaders()
        response = connection.getresponse()
        response.read()
        return response
