"""HTTP GET for downloads from mirrors and other plain servers.

Knows requests, redirects and what the headers say about a file; knows nothing about disks or retries. No
message contains a URL, because a server may redirect to a signed one.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Self

import httpx2

from llama.errors import BadSettings, DownloadFailed
from llama.weights.retry import Transient

_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(\d{1,18}|\*)", re.IGNORECASE)
_CONNECT_TIMEOUT = 10.0
_PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
_CERTIFICATES = {"SSL_CERT_FILE": "cafile", "SSL_CERT_DIR": "capath"}

RETRIED = (408, 425, 429, 500, 502, 503, 504)
"""Statuses after which another attempt may succeed."""

FORBIDDEN = (401, 403)
"""Statuses of a server that wants another token, and of storage whose signed URL has expired."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """The status and headers of a response whose body has not been read yet."""

    response: httpx2.Response

    @property
    def validator(self) -> str | None:
        """A value for `If-Range`: a strong ETag, or a date."""
        etag = str(self.response.headers.get("etag", ""))
        strong = etag.startswith('"') and etag.isascii()
        return etag if strong else self.response.headers.get("last-modified")

    @property
    def start(self) -> int | None:
        """The offset in the file at which the body begins."""
        return 0 if self.response.status_code == 200 else self._content_range()[0]

    @property
    def total(self) -> int | None:
        """The size of the whole file in bytes; None if the server does not send it."""
        if self.response.status_code == 200:
            length = self.response.headers.get("content-length", "")
            return int(length) if length.isdecimal() and len(length) <= 18 else None
        return self._content_range()[1]

    def _content_range(self) -> tuple[int | None, int | None]:
        match = _CONTENT_RANGE.fullmatch(self.response.headers.get("content-range", ""))
        if match is None:
            return None, None
        start, total = match.groups()
        return int(start) if start else None, None if total == "*" else int(total)

    def check(self, name: str) -> None:
        """Accept the statuses 200, 206 and 416.

        Raises Transient if another attempt may help, otherwise DownloadFailed.
        """
        status, host = self.response.status_code, self.response.url.host
        # If the refusal came from a server behind a redirect, a signed URL has probably expired.
        asked = self.response.history[0] if self.response.history else self.response
        expired = status in FORBIDDEN and asked.url.netloc != self.response.url.netloc
        if status in RETRIED or expired:
            raise Transient(f"HTTP {status} from {host}", retry_after(self.response.headers))
        if status in FORBIDDEN:
            raise DownloadFailed(
                f"{name}: HTTP {status} from {host}, to which no token is sent; make the file readable "
                "without one, or correct the manifest or LLAMA_WEIGHTS_BASE_URL"
            )
        if status not in (200, 206, 416):
            raise DownloadFailed(
                f"{name}: HTTP {status} from {host}; correct the manifest or LLAMA_WEIGHTS_BASE_URL"
            )
        if self.response.headers.get("content-encoding", "identity") != "identity":
            raise DownloadFailed(
                f"{name}: {host} sent the file compressed; configure that server to send it unchanged"
            )

    def check_whole(self) -> None:
        """Raises Transient unless the body is the file from its first byte."""
        if self.start != 0:
            raise Transient(f"{self.response.url.host} sent a different range from the one requested")

    def chunks(self) -> Iterator[bytes]:
        """The body, as it arrives."""
        return self.response.iter_raw()


class Transport:
    """A pool of HTTP connections."""

    def __init__(self, timeout: float) -> None:
        """Raises BadSettings if the proxies or certificates in the environment cannot be used."""
        try:
            self._client = httpx2.Client(
                timeout=httpx2.Timeout(timeout, connect=min(timeout, _CONNECT_TIMEOUT)),
                headers={"Accept-Encoding": "identity", "User-Agent": "llama-2-70b-chat"},
                follow_redirects=True,
            )
        # httpx2 reads the environment here, and raises ImportError, ValueError, OSError or its own errors.
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
    def get(self, name: str, url: str, headers: Mapping[str, str]) -> Iterator[ResponseHead]:
        """Request the file `name` and follow redirects. The response may have any status.

        Raises Transient or DownloadFailed, also while the body is being read.
        """
        try:
            with self._client.stream("GET", url, headers=headers) as response:
                _check_redirects(name, response)
                yield ResponseHead(response)
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise DownloadFailed(
                f"{name}: its URL in the manifest is not valid ({error}); correct it"
            ) from error
        except httpx2.TooManyRedirects as error:
            raise DownloadFailed(
                f"{name}: too many redirects from {error.request.url.host}; correct the manifest"
            ) from error
        except httpx2.UnsupportedProtocol as error:
            raise DownloadFailed(
                f"{name}: the server redirects to {error.request.url.scheme}://, which is not supported; "
                "correct the manifest"
            ) from error
        except httpx2.RemoteProtocolError as error:
            if "location header" in str(error):
                raise DownloadFailed(
                    f"{name}: {error.request.url.host} redirects to an invalid URL; correct the manifest"
                ) from error
            raise transient(error, self._timeout) from error
        except httpx2.TransportError as error:
            raise transient(error, self._timeout) from error


def transient(error: httpx2.TransportError, timeout: float) -> Transient:
    """Describe a network failure without its URL."""
    host = error.request.url.host
    if isinstance(error, httpx2.TimeoutException):
        return Transient(f"{host} did not respond within {timeout:.0f} s")
    if isinstance(error, httpx2.ProxyError):
        return Transient(f"the proxy that the environment names refused the connection ({error})")
    if isinstance(error, httpx2.ConnectError):
        return Transient(f"cannot connect to {host} ({error})")
    return Transient(f"the connection to {host} was interrupted")


def retry_after(headers: httpx2.Headers) -> float:
    """Return the `Retry-After` header in seconds, or 0 if there is none. The header may also be a date."""
    text = headers.get("retry-after", "")
    try:
        if text.isdecimal():
            return float(text)
        date = parsedate_to_datetime(text)
        return max(0.0, (date.astimezone(UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return 0.0


def _check_redirects(name: str, response: httpx2.Response) -> None:
    """Raises DownloadFailed if a redirect led from HTTPS to HTTP, where anyone can change the file."""
    schemes = [r.url.scheme for r in (*response.history, response)]
    if "http" in schemes[schemes.index("https") if "https" in schemes else len(schemes) :]:
        raise DownloadFailed(
            f"{name}: {response.history[0].url.host} redirects from https to http, which is not allowed; "
            "correct the manifest"
        )


def _faulty_variable() -> str:
    """Return the name of the first environment variable that httpx2 cannot use. If none of the others is at
    fault, it is NO_PROXY."""
    for name, value in os.environ.items():
        if value and name.upper() in _PROXIES:
            try:
                httpx2.HTTPTransport(proxy=value, trust_env=False).close()
            except Exception:
                return name
    for name, argument in _CERTIFICATES.items():
        if name in os.environ:
            try:
                ssl.create_default_context().load_verify_locations(**{argument: os.environ[name]})
            except OSError:
                return name
    return next((name for name in os.environ if name.upper() == "NO_PROXY"), "NO_PROXY")
