"""Sends requests to addresses that users name, such as webhooks, and keeps them out of private networks.

A name is resolved once, all its addresses are checked, and the connection goes to one of them, so that a name
that resolves differently a moment later reaches nothing else.
"""

from __future__ import annotations

import asyncio
import functools
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import httpx2

IPAddress = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
WebhookResolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Returns the addresses of a host name. Raises OSError if there are none."""

_GLOBAL_UNICAST = IPv6Network("2000::/3")
_TRANSLATED = IPv6Network("64:ff9b::/96")  # NAT64: the last 32 bits are an IPv4 address
_NOT_PUBLIC = (
    # Oracle Cloud's metadata service; `is_global` is true for part of it in Python 3.11.
    IPv4Network("192.0.0.0/24"),
    # Azure's metadata service, which has a public address.
    IPv4Network("168.63.129.16/32"),
)
_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
_RESOLVERS = ThreadPoolExecutor(16, "resolver")  # its own threads: a slow name must not delay other work
_LOOPBACK = (IPv4Address("127.0.0.1"), IPv6Address("::1"))


class AddressRefused(Exception):
    """A host has an address that is neither public nor in one of the allowed networks."""


def is_allowed(address: IPAddress, networks: Sequence[Network]) -> bool:
    """Whether a request may go to an address: it is public, or the operator listed its network."""
    inner = _inner(address)
    if any(inner in network or address in network for network in networks):
        return True
    if isinstance(inner, IPv6Address) and inner not in _GLOBAL_UNICAST:
        return False
    unlisted = any(inner in network for network in _NOT_PUBLIC)
    return inner.is_global and not inner.is_multicast and not inner.is_reserved and not unlisted


def _inner(address: IPAddress) -> IPAddress:
    """The IPv4 address that an IPv6 address leads to, if there is one. Teredo's addresses are not global."""
    if isinstance(address, IPv4Address):
        return address
    if address in _TRANSLATED:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def check_url(url: str, networks: Sequence[Network] = ()) -> None:
    """Find what is wrong with a URL without resolving its host.

    Raises ValueError if the URL is not an absolute HTTP URL or names a private address. The message goes on
    after the name of what contained the URL.
    """
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, UnicodeError, ValueError) as error:
        raise ValueError("must be a valid URL") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError("must be an absolute URL that begins with https:// or http://")
    if parsed.userinfo:
        raise ValueError("must not contain a user name or a password")
    if parsed.port is not None and not 0 < parsed.port < 65536:
        raise ValueError("must have a port between 1 and 65535")
    host = parsed.host.rstrip(".").lower()
    literal = _literal(host)
    if literal is None and not _HOST_NAME.fullmatch(parsed.raw_host.decode()):
        raise ValueError("must have a valid host name")
    refused = literal is not None and not is_allowed(literal, networks)
    if host == "localhost" or host.endswith(".localhost"):
        refused = not any(is_allowed(address, networks) for address in _LOOPBACK)
    if refused:
        raise ValueError("must have a public host")


def _literal(host: str) -> IPAddress | None:
    """The address that a host is written as, also in the old forms such as `127.1` and `0x7f000001`."""
    try:
        return ip_address(host)
    except ValueError:
        pass
    try:
        return IPv4Address(socket.inet_aton(host))
    except (OSError, ValueError):
        return None


async def resolve_host(host: str, port: int) -> list[str]:
    """Return the addresses of a host from the operating system's resolver."""
    # As bytes, because Python's codec for host names raises UnicodeError instead of OSError.
    look_up = functools.partial(socket.getaddrinfo, host.encode(), port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(_RESOLVERS, look_up)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class Outgoing:
    """Sends POST requests. Uses no proxy, follows no redirect and reads no response body."""

    def __init__(
        self,
        networks: Sequence[Network] = (),
        resolver: WebhookResolver = resolve_host,
        tls: ssl.SSLContext | None = None,
        timeout: float = 10.0,
    ) -> None:
        """`networks` are private networks that requests may reach."""
        self._networks, self._resolve = networks, resolver
        self._tls = tls or httpx2.create_ssl_context()
        self._timeout = timeout

    async def post(self, url: str, content: bytes, headers: Mapping[str, str]) -> int:
        """Send a request and return the status of its response.

        Raises AddressRefused, ValueError as `check_url` does, TimeoutError if the whole takes longer than the
        timeout, and OSError or httpx2.HTTPError if it fails.
        """
        check_url(url, self._networks)
        parsed = httpx2.URL(url)
        async with asyncio.timeout(self._timeout):
            for address in (addresses := await self._addresses(parsed)):
                try:
                    return await self._post_to(address, parsed, content, headers)
                except (httpx2.ConnectError, httpx2.ConnectTimeout):  # nothing was sent yet
                    if address is addresses[-1]:
                        raise
        raise OSError("the host has no address")

    async def _addresses(self, url: httpx2.URL) -> list[IPAddress]:
        """Resolve the host of a URL. One address that is not allowed is enough to refuse the host, even if
        the others are: a public service has no private addresses, so such a name is wrong or an attack."""
        host = url.raw_host.decode()
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        found = [ip_address(text) for text in await self._resolve(host, port)]
        if not all(is_allowed(address, self._networks) for address in found):
            raise AddressRefused("the host has an address that is not public")
        return found

    async def _post_to(
        self, address: IPAddress, url: httpx2.URL, content: bytes, headers: Mapping[str, str]
    ) -> int:
        # A transport for each request: a pooled connection would be used again for another name with the same
        # address, without a check of the certificate for that name. A client would also log the URL.
        timeout = httpx2.Timeout(self._timeout, connect=self._timeout / 3)
        request = httpx2.Request(
            "POST",
            url.copy_with(host=str(address), fragment=None),
            content=content,
            headers={**headers, "Host": url.netloc.decode()},
            extensions={"timeout": timeout.as_dict(), "sni_hostname": url.raw_host.decode().rstrip(".")},
        )
        async with httpx2.AsyncHTTPTransport(verify=self._tls, trust_env=False) as transport:
            response = await transport.handle_async_request(request)
            await response.aclose()
            return response.status_code
