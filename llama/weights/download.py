"""Files from HTTP servers: several at once, resumed, verified, and in place only when they are whole.

Bytes gather in a `.part` file, named after what the server says of the file, so that bytes of two versions
are never mixed. Knows which file is downloaded when, and what follows a failure; knows nothing of models.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from llama.errors import DamagedWeights, DiskFull, DownloadFailed, LlamaError
from llama.weights.disk import disk_errors
from llama.weights.file_checks import find_fault
from llama.weights.hash_cache import HashCache
from llama.weights.http import Transport
from llama.weights.partial_file import PartialFile
from llama.weights.progress import progress
from llama.weights.retry import RetryPolicy, Stopped

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """One file that is wanted."""

    url: str
    path: Path
    sha256: str | None
    token: str | None = field(repr=False)
    """Sent to the host of `url`, and never further."""


@dataclass(slots=True)
class _Transfer:
    """A file on its way. The size is None where a server does not tell it."""

    source: Source
    size: int | None
    sha256: str | None
    validator: str | None
    """What `If-Range` takes: a strong ETag, or a date."""
    received: int = 0

    @property
    def part(self) -> Path:
        known = self.sha256 or f"{self.validator}/{self.size}"
        version = hashlib.sha256(known.encode()).hexdigest()[:12]
        return self.source.path.with_name(f"{self.source.path.name}.{version}.part")

    @property
    def resumable(self) -> bool:
        return self.size is not None and (self.sha256 or self.validator) is not None

    @property
    def missing(self) -> int:
        return max(0, (self.size or 0) - self.received)


def download(sources: Sequence[Source], folder: Path, retry: RetryPolicy) -> int:
    """Download the files that are missing or wrong. Returns their number.

    Raises DiskFull, DamagedWeights or DownloadFailed for the first fault, after the other files have been
    tried, and logs the others. Parts are kept, and another call resumes them."""
    with Transport(retry.timeout) as transport:
        return _Download(transport, retry, HashCache(folder)).run(sources, folder)


class _Download:
    def __init__(self, transport: Transport, retry: RetryPolicy, hashes: HashCache) -> None:
        self._transport, self._retry, self._hashes = transport, retry, hashes
        self._stop = threading.Event()

    def run(self, sources: Sequence[Source], folder: Path) -> int:
        pool = ThreadPoolExecutor(self._retry.workers, thread_name_prefix="download")
        try:
            # Nothing is written before every server has been asked: what is refused is known at once.
            found = [t for t in pool.map(self._probe, sources) if t is not None]
            if found:
                for transfer in found:
                    _remove_stale_parts(transfer)
                _check_disk(found, folder)
                self._fetch_all(pool, found)
            return len(found)
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
            self._hashes.save()

    def _probe(self, source: Source) -> _Transfer | None:
        """What the server says of a file; None when it is in its place already."""
        with disk_errors(source.path):
            if source.sha256 and self._is_there(source.path, source.sha256):
                return None
            transfer = self._retry.call(
                lambda: self._ask(source), lambda: 0, name=source.path.name, stop=self._stop
            )
            if transfer.size is None and transfer.sha256 is None:
                raise DownloadFailed(
                    f"{source.path.name}: its server tells neither length nor hash, so nobody could see that "
                    "it is whole; add #sha256=<hash> to its URL in the manifest"
                )
            if not source.sha256 and self._is_there(source.path, transfer.sha256, transfer.size):
                return None
            with suppress(FileNotFoundError):
                transfer.received = transfer.part.stat().st_size if transfer.resumable else 0
        return transfer

    def _is_there(self, path: Path, sha256: str | None, size: int | None = None) -> bool:
        """Whether a file is in its place: by its hash or, if none is known, by its size."""
        if not path.is_file() or size not in (None, path.stat().st_size):
            return False
        return sha256 is None or self._hashes.sha256(path) == sha256

    def _ask(self, source: Source) -> _Transfer:
        # One byte of the file and not a HEAD, which signed URLs refuse.
        with self._transport.get(source.url, source.token, {"Range": "bytes=0-0"}) as head:
            head.check(source.path.name)
            if source.sha256 and head.linked_sha256 not in (None, source.sha256):
                raise DamagedWeights(
                    f"{source.path.name}: the server has another file (sha256 {head.linked_sha256}) "
                    f"than the manifest wants ({source.sha256}); point its URL at the version that was locked"
                )
            return _Transfer(source, head.total, source.sha256 or head.sha256, head.validator)

    def _fetch_all(self, pool: ThreadPoolExecutor, transfers: Sequence[_Transfer]) -> None:
        total = sum(t.size or 0 for t in transfers)
        logger.info("%d files to bring, %.1f GB", len(transfers), sum(t.missing for t in transfers) / 1e9)
        pending = {pool.submit(self._fetch, transfer) for transfer in transfers}
        faults = list[BaseException]()
        with progress(total, sum(t.received for t in transfers)) as show:
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                faults += self._faults(done)
                show(sum(t.received for t in transfers))
        for fault in faults[1:]:
            logger.error("%s", fault)
        if faults:
            raise faults[0]

    def _faults(self, done: set[Future[None]]) -> list[BaseException]:
        faults = [fault for f in done if (fault := f.exception()) and not isinstance(fault, Stopped)]
        # A bug or a full disk ends all; a file that is not to be had leaves the others their time.
        if any(isinstance(fault, DiskFull) or not isinstance(fault, LlamaError) for fault in faults):
            self._stop.set()
        return faults

    def _fetch(self, transfer: _Transfer) -> None:
        path = transfer.source.path
        if self._stop.is_set():
            raise Stopped
        with disk_errors(path), PartialFile(transfer.part, keep=transfer.resumable) as part:
            begun = part.size > 0
            self._receive_whole(transfer, part)
            if begun and _find_fault(transfer, part):
                logger.warning("%s: what was there is damaged; from the beginning", path.name)
                part.restart()
                self._receive_whole(transfer, part)
            if fault := _find_fault(transfer, part):
                part.path.unlink()
                raise DamagedWeights(
                    f"{path.name} {fault}; pull again, and if it stays so, mend the server's copy"
                )
            part.move_to(path)
            self._hashes.add(path, part.sha256)
        logger.info("%s is there%s", path.name, ", its sha256 is right" if transfer.sha256 else "")

    def _receive_whole(self, transfer: _Transfer, part: PartialFile) -> None:
        self._retry.call(
            lambda: self._receive(transfer, part),
            lambda: part.size,
            name=transfer.source.path.name,
            stop=self._stop,
        )

    def _receive(self, transfer: _Transfer, part: PartialFile) -> None:
        if not transfer.resumable or part.size > (transfer.size or 0):
            part.restart()
        transfer.received = part.size
        if part.size == transfer.size:
            return
        source, headers = transfer.source, _range(transfer, part.size)
        with self._transport.get(source.url, source.token, headers) as head:
            head.check(source.path.name)
            if (head.start, head.total) != (part.size, transfer.size):
                part.restart()
                # Nothing but a whole answer may follow.
                head.check_whole()
            for chunk in head.chunks():
                part.write(chunk)
                transfer.received = part.size
                if self._stop.is_set():
                    raise Stopped
                if transfer.size is not None and part.size > transfer.size:
                    return


def _range(transfer: _Transfer, start: int) -> dict[str, str]:
    if start == 0:
        return {}
    headers = {"Range": f"bytes={start}-"}
    # Where a hash decides in the end, a copy on another node, with another ETag, may go on.
    if transfer.sha256 is None and transfer.validator is not None:
        headers["If-Range"] = transfer.validator
    return headers


def _find_fault(transfer: _Transfer, part: PartialFile) -> str | None:
    if transfer.size is not None and part.size != transfer.size:
        return f"came with {part.size} bytes instead of {transfer.size}"
    if transfer.sha256 and part.sha256 != transfer.sha256:
        return f"came with sha256 {part.sha256} instead of {transfer.sha256}"
    # A page of a proxy, say, in the place of a file whose hash nobody knows.
    fault = None if transfer.sha256 else find_fault(part.path, transfer.source.path.name)
    return fault and f"came as {fault}"


def _remove_stale_parts(transfer: _Transfer) -> None:
    """Remove parts of other versions. A wrong file under the right name stays until there is a right one."""
    path = transfer.source.path
    with disk_errors(path):
        if path.exists():
            logger.warning("%s is not the file that the manifest names: it is brought again", path)
        # Of model.safetensors, and not of model.safetensors.index.json.
        ours = re.compile(re.escape(path.name) + r"\.[0-9a-f]{12}\.part")
        for part in path.parent.glob("*.part"):
            if ours.fullmatch(part.name) and (part != transfer.part or not transfer.resumable):
                part.unlink()


def _check_disk(transfers: Sequence[_Transfer], folder: Path) -> None:
    missing = sum(transfer.missing for transfer in transfers)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise DiskFull(
            f"{missing / 1e9:.1f} GB are to come and the disk of {folder} has {free / 1e9:.1f} GB free; free "
            f"{(missing - free) / 1e9:.1f} GB more or pull to another disk"
        )
