"""GET over HTTP for downloads: the token does not follow a redirect to another origin.

Which files are asked for with the token is decided in `folder.py`. Knows requests, redirects and what headers
say of a file; knows nothing of disks or of retries. No message has a URL in it, because URLs that a server
redirects to are signed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Self

import httpx2

from llama.errors import BadSettings, DownloadFailed

_SHA256 = re.compile(r'"?([0-9a-f]{64})"?')
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", re.IGNORECASE)
_REDIRECTS = 10
_FORBIDDEN = (401, 403)
_LATER = (408, 425, 429, 500, 502, 503, 504)
_CONNECT_TIMEOUT = 10.0
_PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")


class Transient(Exception):
    """What may go well at another time. `retry_after` is the server's own word, in seconds."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """The head of a response, its body still to come."""

    response: httpx2.Response
    same_origin: bool
    """From the server that was asked, not from one that it sent us on to."""
    linked_sha256: str | None
    """What a hub's redirect says of the file behind it (`X-Linked-ETag`)."""

    @property
    def sha256(self) -> str | None:
        """The file's, as far as the server that was asked says it."""
        own = self.response.headers.get("etag", "") if self.same_origin else ""
        return self.linked_sha256 or _hash_in(own)

    @property
    def validator(self) -> str | None:
        """What `If-Range` takes."""
        etag = str(self.response.headers.get("etag", ""))
        return etag if etag.startswith('"') else self.response.headers.get("last-modified")

    @property
    def start(self) -> int | None:
        """Where in the file the body begins."""
        return 0 if self.response.status_code == 200 else self._content_range()[0]

    @property
    def total(self) -> int | None:
        """Bytes of the whole file; None when the server does not say."""
        if self.response.status_code == 200:
            length = self.response.headers.get("content-length", "")
            return int(length) if length.isdecimal() else None
        return self._content_range()[1]

    def _content_range(self) -> tuple[int | None, int | None]:
        match = _CONTENT_RANGE.fullmatch(self.response.headers.get("content-range", ""))
        if match is None:
            return None, None
        start, total = match.groups()
        return int(start) if start else None, None if total == "*" else int(total)

    def check(self, name: str) -> None:
        """Raises Transient, or DownloadFailed when asking again would not help. 416 is an answer too."""
        status, host = self.response.status_code, self.response.url.host
        if status in _LATER or (status in _FORBIDDEN and not self.same_origin):
            # A signature that has run out is a 403 of the server behind the redirect.
            raise Transient(f"HTTP {status} from {host}", _retry_after(self.response.headers))
        if status in _FORBIDDEN:
            raise DownloadFailed(
                f"{name}: HTTP {status} from {host}; accept the model's licence on its page and set HF_TOKEN "
                "to a token that may read it (it goes to the manifest's own host, over HTTPS, and no further)"
            )
        if status not in (200, 206, 416):
            raise DownloadFailed(
                f"{name}: HTTP {status} from {host}; correct the manifest or LLAMA_WEIGHTS_BASE_URL"
            )
        if self.response.headers.get("content-encoding", "identity") != "identity":
            raise DownloadFailed(f"{name}: {host} sends it compressed; let it send the file as it is")

    def check_whole(self) -> None:
        if self.start != 0:
            raise Transient(f"another part of the file than was asked for from {self.response.url.host}")

    def chunks(self) -> Iterator[bytes]:
        """As they arrive."""
        return self.response.iter_raw()


class Transport:
    """Connections, kept open for the next file."""

    def __init__(self, timeout: float) -> None:
        """Raises BadSettings when the environment's proxies or certificates cannot be used."""
        try:
            self._client = httpx2.Client(
                timeout=httpx2.Timeout(timeout, connect=min(timeout, _CONNECT_TIMEOUT)),
                headers={"Accept-Encoding": "identity", "User-Agent": "llama-2-70b-chat"},
                follow_redirects=False,
            )
        # httpx2 reads the environment here, and ends in ImportError, ValueError, OSError or errors of its own
        except Exception as error:
            raise BadSettings(
                f"the environment variable {_faulty_variable()} cannot be used for downloads ({error}); "
                "correct it or unset it"
            ) from error
        self._timeout = timeout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @contextmanager
    def get(self, url: str, token: str | None, headers: Mapping[str, str]) -> Iterator[ResponseHead]:
        """Follow redirects to an answer of any status. Raises Transient or DownloadFailed, inside too."""
        linked: str | None = None
        try:
            first = current = httpx2.URL(url)
            for _ in range(_REDIRECTS):
                same_origin = _origin(current) == _origin(first)
                with self._send(current, headers, token if same_origin else None) as response:
                    if same_origin:
                        linked = linked or _hash_in(response.headers.get("x-linked-etag", ""))
                    if not response.has_redirect_location:
                        yield ResponseHead(response, same_origin, linked)
                        return
                    current = _target(current, response)
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise DownloadFailed(f"an address is no URL ({error}); correct the manifest") from error
        except httpx2.TimeoutException as error:
            raise Transient(f"no answer from {current.host} for {self._timeout:.0f} s") from error
        except httpx2.ProxyError as error:
            raise Transient(
                f"the proxy that the environment names does not let us through ({error})"
            ) from error
        except httpx2.ConnectError as error:
            raise Transient(f"no connection to {current.host} ({error})") from error
        except httpx2.TransportError as error:
            raise Transient(f"the connection to {current.host} was cut") from error
        raise DownloadFailed(f"{first.host} redirects without end; correct the manifest")

    @contextmanager
    def _send(
        self, url: httpx2.URL, headers: Mapping[str, str], token: str | None
    ) -> Iterator[httpx2.Response]:
        # Not left to httpx2, which lets the header follow from http to https of the same host.
        authorization = {"Authorization": f"Bearer {token}"} if token else {}
        request = self._client.build_request("GET", url, headers={**headers, **authorization})
        response = self._client.send(request, stream=True)
        try:
            yield response
        finally:
            response.close()


def _faulty_variable() -> str:
    """The name of the first variable that httpx2 cannot use by itself; NO_PROXY is what else it reads."""
    for name, value in os.environ.items():
        if value and name.upper() in _PROXIES:
            try:
                httpx2.HTTPTransport(proxy=value, trust_env=False).close()
            except Exception:
                return name
    for name in _CERTIFICATES:
        if name in os.environ and not Path(os.environ[name]).exists():
            return name
    return next((name for name in os.environ if name.upper() == "NO_PROXY"), "NO_PROXY")


def _origin(url: httpx2.URL) -> tuple[str, str, int]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}[url.scheme]


def _target(url: httpx2.URL, response: httpx2.Response) -> httpx2.URL:
    try:
        target = url.join(response.headers["location"])
    except httpx2.InvalidURL as error:
        raise DownloadFailed(f"{url.host} redirects to no URL; correct the manifest") from error
    if target.scheme not in ("http", "https") or (url.scheme, target.scheme) == ("https", "http"):
        raise DownloadFailed(
            f"{url.host} redirects to {target.scheme}, which is not followed; correct the manifest"
        )
    return target


def _hash_in(etag: str) -> str | None:
    match = _SHA256.fullmatch(etag)
    return match[1] if match else None


def _retry_after(headers: httpx2.Headers) -> float:
    """Seconds, or a date; 0 when there is neither."""
    text = headers.get("retry-after", "")
    if text.isdecimal():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    return max(0.0, (date.astimezone(UTC) - datetime.now(UTC)).total_seconds())
