"""Downloads of several files at once: from the Hugging Face hub, and from mirrors and other HTTP servers.

A file appears under its final name only after it has been verified. Knows which file is downloaded when, and
what happens after a failure; knows nothing about models.
"""

from __future__ import annotations

import logging
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from llama.errors import DiskFull, LlamaError
from llama.weights.disk import disk_errors
from llama.weights.hash_cache import HashCache
from llama.weights.http import Transport
from llama.weights.http_file import HttpServers
from llama.weights.hub import Hub
from llama.weights.hub_location import hub_location
from llama.weights.progress import progress
from llama.weights.retry import RetryPolicy, Stopped
from llama.weights.transfer import Source, Transfer

logger = logging.getLogger(__name__)

_GRACE = 1.0  # seconds to wait for the threads to stop


def download(sources: Sequence[Source], folder: Path, retry: RetryPolicy, token: str | None) -> int:
    """Download the files that are missing or wrong. Returns their number.

    `token` is sent to the hub only. Raises BadManifest, BadSettings, DiskFull, DamagedWeights or
    DownloadFailed. A fault before the first download, and a full disk, are raised at once. After any other
    fault, the other files are still downloaded; then the first fault is raised, and the others are logged.
    """
    stop = threading.Event()
    located = [(source, hub_location(source.url, source.name)) for source in sources]
    with ExitStack() as stack:
        servers = HttpServers(stack.enter_context(Transport(retry.timeout)), retry, stop)
        hub = None
        if any(location for _, location in located):
            hub = stack.enter_context(Hub(folder, token, retry, stop))
        probes = [
            _Probe(source, partial(hub.describe, location) if hub and location else servers.describe)
            for source, location in located
        ]
        return _Download(hub, HashCache(folder), stop).run(probes, folder, retry.workers)


class _Probe(NamedTuple):
    source: Source
    describe: Callable[[Source], Transfer]
    """Asks the server about the file."""


class _Download:
    def __init__(self, hub: Hub | None, hashes: HashCache, stop: threading.Event) -> None:
        self._hub, self._hashes, self._stop = hub, hashes, stop

    def run(self, probes: Sequence[_Probe], folder: Path, workers: int) -> int:
        pool = ThreadPoolExecutor(workers, thread_name_prefix="download")
        tasks = list[Future[Any]]()
        try:
            # Ask about every file before anything is written, so that a refusal is reported at once.
            asked = [pool.submit(self._probe, *probe) for probe in probes]
            tasks += asked
            found = [transfer for answer in asked if (transfer := answer.result()) is not None]
            if found:
                for transfer in found:
                    _remove_stale_parts(transfer)
                _check_disk(found, folder)
                fetches = [pool.submit(self._fetch, transfer) for transfer in found]
                tasks += fetches
                _finish(fetches, found, self._stop)
            return len(found)
        finally:
            # Do not wait for threads that wait for a server, so that Ctrl-C ends a pull at once.
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            if self._hub is not None and not all(task.done() for task in tasks):
                self._hub.abort()
            wait([task for task in tasks if not task.done()], timeout=_GRACE)
            self._hashes.save()

    def _probe(self, source: Source, describe: Callable[[Source], Transfer]) -> Transfer | None:
        """Ask a server about a file. Returns None if the file is in place already."""
        with disk_errors(source.path):
            if source.sha256 and self._is_in_place(source.path, source.sha256):
                return None
            transfer = describe(source)
            transfer.check_verifiable()
            in_place = not source.sha256 and self._is_in_place(source.path, transfer.sha256, transfer.size)
            return None if in_place else transfer

    def _is_in_place(self, path: Path, sha256: str | None, size: int | None = None) -> bool:
        """Whether the file exists and has the right hash or, if the hash is not known, the right size."""
        if not path.is_file() or size not in (None, path.stat().st_size):
            return False
        return sha256 is None or self._hashes.sha256(path) == sha256

    def _fetch(self, transfer: Transfer) -> None:
        if self._stop.is_set():
            raise Stopped
        source = transfer.source
        with disk_errors(source.path):
            self._hashes.add(source.path, transfer.fetch())
        logger.info("downloaded %s%s", source.name, ", SHA-256 verified" if transfer.sha256 else "")


def _finish(fetches: Sequence[Future[None]], transfers: Sequence[Transfer], stop: threading.Event) -> None:
    """Show the progress until all downloads have ended. Raises the first fault and logs the others."""
    total = sum(t.size or 0 for t in transfers)
    files = "1 file" if len(transfers) == 1 else f"{len(transfers)} files"
    logger.info("%s to download, %.1f GB", files, sum(t.missing for t in transfers) / 1e9)
    pending, faults = set(fetches), list[BaseException]()
    with progress(total, sum(t.received for t in transfers)) as show:
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            new = [fault for f in done if (fault := f.exception()) and not isinstance(fault, Stopped)]
            # A bug or a full disk stops everything; after any other fault, the other files are still tried.
            if any(isinstance(fault, DiskFull) or not isinstance(fault, LlamaError) for fault in new):
                stop.set()
                pending = set()
            faults += new
            show(sum(t.received for t in transfers))
    for fault in faults[1:]:
        logger.error("%s", fault)
    if faults:
        raise faults[0]


def _remove_stale_parts(transfer: Transfer) -> None:
    """Remove the parts of other versions. A wrong file under the final name stays until it is replaced."""
    path = transfer.source.path
    with disk_errors(path):
        if path.exists():
            logger.warning("%s is not the file that the manifest lists; downloading it again", path)
        # Matches a part of model.safetensors, but not one of model.safetensors.index.json.
        ours = re.compile(re.escape(path.name) + r"\.[0-9a-f]{12}\.part")
        for part in path.parent.glob("*.part"):
            if ours.fullmatch(part.name) and (part != transfer.part or not transfer.received):
                part.unlink()


def _check_disk(transfers: Sequence[Transfer], folder: Path) -> None:
    missing = sum(transfer.missing for transfer in transfers)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise DiskFull(
            f"{missing / 1e9:.1f} GB must be downloaded, but the disk of {folder} has {free / 1e9:.1f} GB "
            f"free; free another {(missing - free) / 1e9:.1f} GB or pull to another disk"
        )
