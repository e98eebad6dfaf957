"""Downloads from the Hugging Face hub, through huggingface_hub, which uses hf-xet for large files.

A file is staged in a hidden folder, verified, and then moved into place. Knows repositories and revisions;
knows nothing about mirrors or the other files of a pull. HF_ENDPOINT is read by huggingface_hub itself.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from llama.errors import BadSettings, DamagedWeights, DownloadFailed
from llama.weights.disk import disk_errors, file_sha256, move_into_place
from llama.weights.hub_faults import translate
from llama.weights.hub_location import HubLocation
from llama.weights.manifest import split_http_url
from llama.weights.retry import RetryPolicy, Stopped
from llama.weights.transfer import Source, Transfer

_STAGING = ".hub"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_ATTEMPTS = 3


class Hub:
    """Access to the hub for one pull, as a context manager. The caller holds the lock of `folder`."""

    def __init__(self, folder: Path, token: str | None, retry: RetryPolicy, stop: threading.Event) -> None:
        """Raises BadSettings if huggingface_hub cannot use its environment variables."""
        _silence()
        # Absolute, because huggingface_hub expands a `~`.
        self.staging = folder.absolute() / _STAGING
        # huggingface_hub itself makes up to five attempts if a failure is worth retrying.
        self.retry, self.stop = replace(retry, attempts=min(retry.attempts, _ATTEMPTS)), stop
        # False, because None would let huggingface_hub look for a token in other places.
        self.token: str | bool = token or False

    def __enter__(self) -> Self:
        # Remove the parts of an earlier process, which huggingface_hub does not resume.
        with disk_errors(self.staging):
            if self.staging.is_symlink() or self.staging.is_file():
                self.staging.unlink()
            for part in self.staging.rglob("*.incomplete"):
                part.unlink(missing_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            shutil.rmtree(self.staging, ignore_errors=True)

    def describe(self, location: HubLocation, source: Source) -> HubFile:
        """Ask the hub about a file. Raises BadSettings, DownloadFailed or DamagedWeights."""
        self._check_environment()
        return self.retry.call(
            lambda: self._ask(source, location), lambda: 0, name=source.name, stop=self.stop
        )

    def _check_environment(self) -> None:
        from huggingface_hub import constants

        endpoint = split_http_url(constants.ENDPOINT)
        if endpoint is None:
            raise BadSettings("HF_ENDPOINT is not a URL; set it to https://HOST or unset it")
        if self.token and endpoint.scheme == "http" and endpoint.hostname not in _LOOPBACK:
            raise BadSettings(
                f"HF_ENDPOINT is http://{endpoint.hostname}, and HF_TOKEN is not sent without encryption; "
                "set HF_ENDPOINT to an https:// URL or unset HF_TOKEN"
            )
        if constants.is_offline_mode():
            raise DownloadFailed(
                "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so nothing can be downloaded from the hub; "
                "unset it"
            )

    def _ask(self, source: Source, location: HubLocation) -> HubFile:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import FileMetadataError

        with self.translated_faults(source.name, self.retry.timeout, from_storage=False):
            url = hf_hub_url(location.repository, location.path, revision=location.revision)
            metadata = get_hf_file_metadata(url, token=self.token, timeout=self.retry.timeout)
            if metadata.commit_hash is None:
                raise FileMetadataError
        # The hub's ETag of a large file is its SHA-256; of a small one it is a git hash.
        stored = metadata.etag if _SHA256.fullmatch(metadata.etag or "") else None
        if source.sha256 and stored not in (None, source.sha256):
            raise DamagedWeights(
                f"{source.name}: the hub has a file with the SHA-256 {stored}, but the manifest requires "
                f"{source.sha256}; in the manifest, set the revision in the URL of this file to the "
                "commit whose hashes `weights lock` recorded"
            )
        # Download from the commit, because a branch may move in the meantime.
        pinned = HubLocation(location.repository, metadata.commit_hash, location.path)
        file = HubFile(source, metadata.size, source.sha256 or stored, pinned, self)
        if file.staged.is_file():
            file.received = file.staged.stat().st_size
        return file

    @contextmanager
    def translated_faults(self, name: str, timeout: float, *, from_storage: bool) -> Iterator[None]:
        """Turn the exceptions of huggingface_hub into Stopped, Transient, or an error of this package.

        `timeout` is the one that huggingface_hub uses, in seconds. See `translate` for `from_storage`.
        """
        try:
            yield
        except Exception as error:
            if self.stop.is_set():
                raise Stopped from error
            fault = translate(error, name, timeout, from_storage=from_storage)
            if fault is error:
                raise
            raise fault from error

    def abort(self) -> None:
        """Stop the transfers of hf-xet, which ignore `stop`."""
        from huggingface_hub.utils._xet import abort_xet_session

        abort_xet_session()  # type: ignore[no-untyped-call]


@dataclass(slots=True)
class HubFile(Transfer):
    """A file on the hub."""

    location: HubLocation
    hub: Hub

    @property
    def folder(self) -> Path:
        """A folder for this file alone: two repositories may have files with the same path."""
        identity = f"{self.location.repository} {self.location.revision} {self.source.path}"
        return self.hub.staging / hashlib.sha256(identity.encode()).hexdigest()[:12]

    @property
    def staged(self) -> Path:
        """Where huggingface_hub writes the complete file."""
        return self.folder / self.location.path

    def fetch(self) -> str:
        self.hub.retry.call(self._download, lambda: self.received, name=self.source.name, stop=self.hub.stop)
        if self.hub.stop.is_set():  # the pull has failed, and another one may hold the lock by now
            raise Stopped
        sha256 = file_sha256(self.staged)
        if fault := self.fault_of(self.staged, self.staged.stat().st_size, sha256):
            self.staged.unlink()
            raise self.damaged(fault)
        move_into_place(self.staged, self.source.path)
        return sha256

    def _download(self) -> None:
        from huggingface_hub import constants, hf_hub_download

        if self.hub.stop.is_set():
            raise Stopped
        self.received = 0
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with self.hub.translated_faults(self.source.name, timeout, from_storage=True):
            hf_hub_download(
                self.location.repository,
                self.location.path,
                revision=self.location.revision,
                local_dir=self.folder,
                token=self.hub.token,
                etag_timeout=self.hub.retry.timeout,
                tqdm_class=_counter(self),
            )
        self.received = self.size or 0


def _silence() -> None:
    """Switch off the telemetry of huggingface_hub and hf-xet, and the warnings of huggingface_hub.

    The warnings contain signed URLs, and only repeat what it retries or raises. Raises BadSettings.
    """
    # hf-xet reads the variable, and so does huggingface_hub unless transformers has imported it already.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        from huggingface_hub import constants
        from huggingface_hub.utils import logging as hub_logging
    except ValueError as error:
        raise BadSettings(
            f"huggingface_hub cannot use one of the HF_ environment variables ({error}); correct it or "
            "unset it"
        ) from error
    constants.HF_HUB_DISABLE_TELEMETRY = True
    hub_logging.set_verbosity(logging.CRITICAL)


def _counter(file: HubFile) -> Any:
    """Return a class for a progress bar, which counts bytes and ends the download when `stop` is set."""
    caller = threading.current_thread()

    class Counter:
        def __init__(self, **_: object) -> None:
            pass

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int) -> None:
            file.received += count
            # hf-xet calls this from a thread of its own, where it would print and ignore an exception.
            if file.hub.stop.is_set() and threading.current_thread() is caller:
                raise Stopped

        def update_transfer(self, count: int) -> None:
            """Bytes on the network, which are fewer than those of the file if hf-xet finds duplicates."""

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            pass

        set_transfer_postfix_str = set_postfix_str

    return Counter
