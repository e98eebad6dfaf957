"""A file from a mirror or another plain HTTP server, downloaded into a `.part` file and resumed.

The part is named after the version of the file, so bytes of two versions are never mixed. Knows ranges and
validators; knows nothing about other files.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llama.weights.disk import move_into_place
from llama.weights.http import Transport
from llama.weights.partial_file import PartialFile
from llama.weights.retry import RetryPolicy, Stopped
from llama.weights.transfer import Source, Transfer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HttpServers:
    """Mirrors and other servers that need no token."""

    transport: Transport
    retry: RetryPolicy
    stop: threading.Event

    def describe(self, source: Source) -> HttpFile:
        """Ask the server about a file. Raises DownloadFailed."""
        transfer = self.retry.call(lambda: self._ask(source), lambda: 0, name=source.name, stop=self.stop)
        if transfer.resumable:
            with suppress(FileNotFoundError):
                transfer.received = transfer.part.stat().st_size
        return transfer

    def _ask(self, source: Source) -> HttpFile:
        # Request the first byte, because signed URLs refuse HEAD requests.
        with self.transport.get(source.name, source.url, {"Range": "bytes=0-0"}) as head:
            head.check(source.name)
            return HttpFile(source, head.total, source.sha256, head.validator, self)


@dataclass(slots=True)
class HttpFile(Transfer):
    """A file on a mirror or another plain HTTP server."""

    validator: str | None
    """A value for `If-Range`."""
    servers: HttpServers

    @property
    def part(self) -> Path:
        known = self.sha256 or f"{self.validator}/{self.size}"
        version = hashlib.sha256(known.encode()).hexdigest()[:12]
        return self.source.path.with_name(f"{self.source.name}.{version}.part")

    @property
    def resumable(self) -> bool:
        return self.size is not None and (self.sha256 or self.validator) is not None

    def fetch(self) -> str:
        with PartialFile(self.part, keep=self.resumable) as part:
            resumed = part.size > 0
            self._receive_all(part)
            if resumed and self.fault_of(part.path, part.size, part.sha256):
                logger.warning("%s: the partial file is damaged; starting over", self.source.name)
                part.restart()
                self._receive_all(part)
            if fault := self.fault_of(part.path, part.size, part.sha256):
                part.path.unlink()
                raise self.damaged(fault)
            move_into_place(part.path, self.source.path)
            return part.sha256

    def _receive_all(self, part: PartialFile) -> None:
        self.servers.retry.call(
            lambda: self._receive(part), lambda: part.size, name=self.source.name, stop=self.servers.stop
        )

    def _receive(self, part: PartialFile) -> None:
        if not self.resumable or part.size > (self.size or 0):
            part.restart()
        self.received = part.size
        if part.size == self.size:
            return
        with self.servers.transport.get(self.source.name, self.source.url, self._range(part.size)) as head:
            head.check(self.source.name)
            if (head.start, head.total) != (part.size, self.size):
                part.restart()
                head.check_whole()
            for chunk in head.chunks():
                part.write(chunk)
                self.received = part.size
                if self.servers.stop.is_set():
                    raise Stopped
                if self.size is not None and part.size > self.size:
                    return

    def _range(self, start: int) -> dict[str, str]:
        if start == 0:
            return {}
        headers = {"Range": f"bytes={start}-"}
        # If the hash is known, the rest may come from a copy on another node, which has another ETag.
        if self.sha256 is None and self.validator is not None:
            headers["If-Range"] = self.validator
        return headers
