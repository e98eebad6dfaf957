"""Translates the exceptions of huggingface_hub and hf-xet into those of this package.

No message contains a URL, because the URLs of the hub's storage are signed. Knows exceptions; knows nothing
about files.
"""

from __future__ import annotations

import errno
import os
import re
from urllib.parse import urlsplit

import httpx2

from llama.errors import DownloadFailed
from llama.weights.disk import FULL
from llama.weights.http import FORBIDDEN, RETRIED, retry_after, transient
from llama.weights.retry import Transient

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT)
_URL = re.compile(r"https?://\S+")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def translate(error: Exception, name: str, timeout: float, *, from_storage: bool) -> Exception:
    """Return Transient if another attempt may help, otherwise DownloadFailed, the OSError of a full disk, or
    `error` itself if it is of an unknown kind.

    `name` is the file's. `from_storage`: the contents were being downloaded, and hf-xet reports any failure
    of the hub's storage as a RuntimeError or a ValueError.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        fault = translate(error.__cause__, name, timeout, from_storage=from_storage)
        # Raised after huggingface_hub has retried the request itself.
        return DownloadFailed(f"{name}: {fault}; pull again later") if isinstance(fault, Transient) else fault
    return _translate(error, name, timeout, from_storage)


def _translate(error: Exception, name: str, timeout: float, from_storage: bool) -> Exception:
    from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, HFValidationError

    if isinstance(error, HfHubHTTPError):
        return _http_fault(error.response, name)
    unusable = FileMetadataError, httpx2.TooManyRedirects, httpx2.UnsupportedProtocol, httpx2.InvalidURL
    if isinstance(error, unusable):
        return DownloadFailed(
            f"{name}: {_endpoint_host()} does not respond like a Hugging Face hub; correct HF_ENDPOINT"
        )
    if isinstance(error, httpx2.TransportError):
        return transient(error, timeout)
    if isinstance(error, httpx2.DecodingError):
        return Transient(f"{error.request.url.host} sent a response that cannot be decompressed")
    if isinstance(error, HFValidationError):
        return DownloadFailed(
            f"{name}: its URL does not name a valid repository on the hub; correct the manifest"
        )
    unnumbered = isinstance(error, OSError) and error.errno is None
    if from_storage and (unnumbered or isinstance(error, RuntimeError | ValueError)):
        return _storage_fault(error, name)
    return error


def _http_fault(response: httpx2.Response, name: str) -> Exception:
    status, host = response.status_code, response.url.host
    # The hub itself refuses at the HEAD request that comes first; its storage refuses an expired signed URL.
    expired = status in FORBIDDEN and response.request.method != "HEAD"
    if status in RETRIED or expired:
        return Transient(f"HTTP {status} from {host}", retry_after(response.headers))
    if status in FORBIDDEN:
        return DownloadFailed(
            f"{name}: HTTP {status} from {host}; accept the model's licence on its page and set HF_TOKEN to "
            "a token that may read it"
        )
    missing = {"RepoNotFound": "repository", "RevisionNotFound": "revision", "EntryNotFound": "file"}
    what = missing.get(response.headers.get("x-error-code", ""))
    if what:
        return DownloadFailed(
            f"{name}: {host} does not have this {what} (HTTP {status}); correct the manifest"
        )
    return DownloadFailed(f"{name}: HTTP {status} from {host}; correct the manifest or HF_ENDPOINT")


def _storage_fault(error: Exception, name: str) -> Exception:
    """Translate an error of hf-xet, or of a response that is too short. The cause is in the message only."""
    text = _URL.sub("...", str(error))
    match = _OS_ERROR.search(text)
    number = int(match[1]) if match else None
    if number in FULL:
        return OSError(number, os.strerror(number))
    if number in _UNWRITABLE:
        return DownloadFailed(
            f"{name}: hf-xet cannot write to its folder ({text}); set HF_HOME to a folder that this user may "
            "write to"
        )
    if text.startswith("Consistency check failed"):
        return Transient(f"the connection to the storage of {_endpoint_host()} was interrupted")
    return Transient(f"the storage of {_endpoint_host()} failed ({text})")


def _endpoint_host() -> str:
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).hostname or ""
