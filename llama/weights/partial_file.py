"""Files and folders that are on their way, so that nothing half done is ever taken for whole.

A file's bytes gather in a `.part` file beside its place. Knows disks, locks and hashes; knows nothing of
where the bytes come from.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from llama.errors import DiskFull, DownloadFailed

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHUNK = 2**20

PACKED = "packed_by_weights_pack"
"""The key of a `config.json` by which a folder is known that was packed, and not pulled."""

LOCK = ".lock"
"""The file in a folder that is being filled by which processes keep out of each other's way."""


class Part:
    """Open while the file comes. Every method may raise OSError: see `disk_errors`."""

    def __init__(self, path: Path, keep: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | (0 if keep else os.O_TRUNC)
        self.path = path
        # Unbuffered: what has been received is in the file, whatever happens next.
        self._file = open(os.open(path, flags, 0o666), "r+b", buffering=0)  # noqa: PTH123, SIM115
        self.size = 0
        self._hash = hashlib.sha256()
        while chunk := self._file.read(_CHUNK):
            self._hash.update(chunk)
            self.size += len(chunk)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        left = memoryview(chunk)
        while left:
            left = left[self._file.write(left) :]
        self.size += len(chunk)

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._hash = hashlib.sha256()
        self.size = 0

    def move_to(self, place: Path) -> None:
        """On the disk first, then under its name: a power cut leaves a whole file or none."""
        os.fsync(self._file.fileno())
        self.path.replace(place)
        folder = os.open(place.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make a folder and hold its lock, waiting for another process that has it. The end of a process
    gives it back in any case."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            logger.info("another process is at work in %s; waiting for it", folder)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Tell OSErrors as DiskFull or DownloadFailed; `path` is the file's place."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"the disk of {path.parent} is full; free some and try again, a pull goes on where it was"
            ) from error
        raise DownloadFailed(
            f"{path} cannot be written ({error.strerror or type(error).__name__}); choose a folder that "
            "this user may write"
        ) from error
