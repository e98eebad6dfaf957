"""Folder locks, hashes, moving a file into place, and faults of the disk.

Knows files and errors of the operating system; knows nothing about their contents.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama.errors import DiskFull, DownloadFailed

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The error numbers of a full disk, an exceeded quota and a file above the allowed size."""

LOCK = ".lock"
"""The name of the lock file in a folder that is being written."""


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Create a folder and lock it for this process, waiting while another process has the lock. The operating
    system releases the lock when the process ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            logger.info("another process is writing to %s; waiting for it to finish", folder)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def move_into_place(part: Path, path: Path) -> None:
    """Rename a finished file. It is written to the disk first, so that after a power cut the file under the
    final name is either complete or missing. May raise OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sync(part)
    part.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Write a file or the entries of a folder to the disk. May raise OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn OSError into DiskFull or DownloadFailed. `path` is the file or folder that is read or written."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(
                f"the disk of {path.parent} is full; free some space and run the command again"
            ) from error
        raise DownloadFailed(
            f"{path} cannot be read or written ({error.strerror or type(error).__name__}); choose a folder "
            "that this user may read and write"
        ) from error
