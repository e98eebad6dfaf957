"""Recognises the URLs of files on the Hugging Face hub.

Knows how the hub's URLs are built; knows nothing about networks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from llama.errors import BadManifest

_HOST = "huggingface.co"
_PATH = re.compile(r"/([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)")


@dataclass(frozen=True, slots=True)
class HubLocation:
    """A file in a repository on the hub."""

    repository: str
    revision: str
    path: str


def hub_location(url: str, name: str) -> HubLocation | None:
    """Parse a URL such as `https://huggingface.co/OWNER/NAME/resolve/REVISION/PATH`.

    Returns None for a URL of another server. Raises BadManifest for any other URL of the hub.
    """
    parts = urlsplit(url)
    if parts.hostname != _HOST:
        return None
    match = _PATH.fullmatch(parts.path)
    location = HubLocation(*map(unquote, match.groups())) if match else None
    if (
        location is None
        or {"", ".", ".."} & set(location.path.split("/"))
        or (parts.scheme, parts.port or 443) != ("https", 443)
        or parts.query not in ("", "download=true")  # the link that the hub's pages offer
    ):
        raise BadManifest(
            f"the URL of {name} does not name a file of a model on the hub; write "
            f"https://{_HOST}/OWNER/NAME/resolve/REVISION/PATH"
        )
    return location
