"""The addresses of the servers: from options, a file, or a DNS name with several addresses.

Knows names and URLs. Knows nothing about whether a server is ready.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from llama.errors import BadSettings

logger = logging.getLogger(__name__)

Resolver = Callable[[str], Awaitable[list[str]]]


@dataclass(frozen=True)
class ServerAddress:
    """Where one server listens."""

    url: str
    host: str
    """The value of the Host header: the name that the operator gave."""


async def resolve(name: str) -> list[str]:
    """Return the IP addresses of a host name. Raises OSError if it cannot be resolved."""
    found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return sorted({str(entry[4][0]) for entry in found})


def checked_url(text: str) -> str:
    """Return a server's URL without a slash at its end. Raises BadSettings if the text is not one."""
    if "@" in text:  # not quoted, because it may contain a password
        raise BadSettings(
            "the address of a server contains an @, but it can have no user name or password; write it like "
            "http://127.0.0.1:5000"
        )
    try:
        parts = urlsplit(text.strip())
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        valid = valid and not (parts.query or parts.fragment)
        valid = valid and _can_be_host(parts.hostname or "") and ".." not in unquote(parts.path).split("/")
        valid = valid and not any(character.isspace() for character in text.strip())  # urlsplit drops some
    except ValueError:
        valid = False
    if not valid:
        raise BadSettings(
            f"{text!r} is not the address of a server; write it like http://127.0.0.1:5000"
        ) from None
    return text.strip().rstrip("/")


def _can_be_host(name: str) -> bool:
    name = name.removesuffix(".")
    labels_fit = all(0 < len(label) <= 63 for label in name.split("."))
    return labels_fit and len(name) <= 253


def read_servers(path: Path) -> list[str]:
    """Read a file with one URL per line. Blank lines and lines that start with # are ignored.

    Raises BadSettings if it cannot be read, or has no address or an invalid one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadSettings(
            f"the list of servers {path} cannot be read ({error}); correct --servers"
        ) from error
    urls = [checked_url(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not urls:
        raise BadSettings(f"the list of servers {path} is empty; write one address per line")
    return urls


class Addresses:
    """The current addresses. A name that resolves to several IP addresses stands for several servers."""

    def __init__(self, urls: Iterable[str], file: Path | None = None, resolver: Resolver = resolve) -> None:
        """Raises BadSettings if an address or the file is invalid."""
        self._file, self._resolver = file, resolver
        self._urls = read_servers(file) if file else [checked_url(url) for url in urls]
        self._known = dict[str, list[ServerAddress]]()

    def reload(self) -> None:
        """Read the file again. If it is invalid, the old list is kept."""
        if self._file is None:
            return
        try:
            self._urls = read_servers(self._file)
            logger.info("read %s again: %d addresses", self._file, len(self._urls))
        except BadSettings as error:
            logger.error("%s; the old list of servers is kept", error)

    async def current(self) -> list[ServerAddress]:
        """Resolve the names. A name that cannot be resolved keeps its last addresses."""
        groups = await asyncio.gather(*(self._addresses_of(url) for url in self._urls))
        return list(dict.fromkeys(address for group in groups for address in group))

    async def _addresses_of(self, url: str) -> list[ServerAddress]:
        parts = urlsplit(url)
        name = parts.hostname or ""
        # With HTTPS, the certificate is for the name. A loopback name is one server with two addresses.
        if parts.scheme == "https" or name == "localhost" or _is_ip(name):
            return [ServerAddress(url, parts.netloc)]
        try:
            found = await self._resolver(name)
        except (OSError, UnicodeError) as error:  # UnicodeError: not a valid host name
            if url not in self._known:
                logger.warning("the server's name %s cannot be resolved (%s)", name, error)
                self._known[url] = []
            return self._known[url]
        # A machine with an IPv4 and an IPv6 address would count as two servers.
        found = [ip for ip in found if ":" not in ip] or found
        self._known[url] = [ServerAddress(_with_ip(parts, ip), parts.netloc) for ip in found]
        return self._known[url]


def _is_ip(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _with_ip(parts: SplitResult, ip: str) -> str:
    host = f"[{ip}]" if ":" in ip else ip
    return parts._replace(netloc=f"{host}:{parts.port}" if parts.port else host).geturl()
