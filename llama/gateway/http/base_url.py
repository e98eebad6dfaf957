"""Finds the address under which a client sees the gateway. The URLs in responses begin with it."""

from __future__ import annotations

import re
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import Scope

from llama.gateway.problems import Problem
from llama.gateway.settings import GatewaySettings

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_][A-Za-z0-9_.-]*)(:[0-9]{1,5})?")
_PORT = re.compile(r"[0-9]{1,5}")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def base_url_of(scope: Scope, settings: GatewaySettings) -> str:
    """Return the scheme and the host, without a slash at the end: those of `public_url` if it is set,
    otherwise those that a trusted proxy names, otherwise those of the request.

    Raises Problem 400 if the request's host is not valid.
    """
    if settings.public_url:
        return settings.public_url.rstrip("/")
    headers = Headers(scope=scope)
    scheme, host = scope["scheme"], headers.get("host") or _server(scope)
    if _is_trusted(scope, settings):
        scheme = _last(headers, "x-forwarded-proto").lower() or scheme
        host = _last(headers, "x-forwarded-host") or host
        host = _with_port(host, scheme, _last(headers, "x-forwarded-port"))
    if scheme not in _DEFAULT_PORTS or not _HOST.fullmatch(host):
        raise Problem(400, "Bad request", "The Host header of the request is not valid.", code="invalid_host")
    return f"{scheme}://{host}"


def _server(scope: Scope) -> str:
    """The address that was connected to, for a request of HTTP/1.0 without a Host header."""
    name, port = scope.get("server") or ("localhost", None)
    host = f"[{name}]" if ":" in name else name
    return f"{host}:{port}" if port else host


def _is_trusted(scope: Scope, settings: GatewaySettings) -> bool:
    if not settings.trusted_proxies or not scope.get("client"):
        return False
    try:
        address = ip_address(scope["client"][0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)  # an IPv4 client of a socket that also accepts IPv6
    return any((mapped or address) in network for network in settings.trusted_proxies)


def _last(headers: Headers, name: str) -> str:
    """The last value of a header. The trusted proxy added it; earlier values may come from the client."""
    values = headers.getlist(name)
    return values[-1].rpartition(",")[2].strip() if values else ""


def _with_port(host: str, scheme: str, port: str) -> str:
    has_port = ":" in host.rpartition("]")[2]
    if has_port or not _PORT.fullmatch(port) or port == _DEFAULT_PORTS.get(scheme):
        return host
    return f"{host}:{port}"
