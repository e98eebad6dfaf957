"""A `.part` file beside its destination, which collects the bytes of a download.

Knows files and hashes; knows nothing about where the bytes come from.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Self

_CHUNK = 2**20


class PartialFile:
    """An open `.part` file, with the hash of its bytes. Every method may raise OSError: see `disk_errors`."""

    def __init__(self, path: Path, keep: bool) -> None:
        """Open or create the file. `keep` keeps the bytes that it already has."""
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | (0 if keep else os.O_TRUNC)
        self.path = path
        # Unbuffered, so that every received byte is in the file if the process is killed.
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
        """Discard all bytes."""
        self._file.seek(0)
        self._file.truncate()
        self._hash = hashlib.sha256()
        self.size = 0
