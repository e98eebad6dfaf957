"""Folders that one process at a time works in, and what goes wrong on a disk.

Knows locks, hashes and errors of the operating system; knows nothing of what is written.
"""

from __future__ import annotations

import errno
import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama.errors import DiskFull, DownloadFailed

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

PACKED = "packed_by_weights_pack"
"""The key of a `config.json` by which a folder is known that was packed, and not pulled."""

LOCK = ".lock"
"""The file in a folder that is being filled by which processes keep out of each other's way."""


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
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
