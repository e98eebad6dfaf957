"""Tells whether a request comes from the gateway's own page: other sites must not use a browser's session.

The cookie's `SameSite=Strict` is not enough: other ports of the same host belong to the same site.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import Scope

from llama.gateway.http.base_url import base_url_of
from llama.gateway.problems import Problem
from llama.gateway.settings import GatewaySettings

_SAFE_METHODS = ("GET", "HEAD")


def check_same_origin(scope: Scope, settings: GatewaySettings) -> None:
    """Raises Problem 403 unless the gateway's own page sent the request. A GET or HEAD may also come from
    the address bar, or from a browser that sends no origin, because it changes nothing."""
    headers, safe = Headers(scope=scope), scope["method"] in _SAFE_METHODS
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:  # the browser has compared the origins, so a proxy cannot confuse it
        own = site == "same-origin" or (safe and site == "none")
    elif origin is not None:
        own = _is_own(origin.lower(), scope, settings)
    else:
        own = safe
    if not own:
        raise Problem(
            403,
            "Forbidden",
            "The request has the cookie of the gateway's page, or asks for one, but does not come from that "
            "page: its Origin header does not name the gateway's address. Send a key in the Authorization "
            "header instead. Behind a proxy, set LLAMA_GATEWAY_PUBLIC_URL.",
            code="cross_site_request",
        )


def _is_own(origin: str, scope: Scope, settings: GatewaySettings) -> bool:
    """A proxy may change the scheme and the host of a request, so both addresses count: the one that clients
    use, and the one in the request."""
    scheme, _, host = base_url_of(scope, settings).lower().partition("://")
    own_host = Headers(scope=scope).get("host", "").lower()
    return origin in (f"{scheme}://{host.partition('/')[0]}", f"http://{own_host}", f"https://{own_host}")
