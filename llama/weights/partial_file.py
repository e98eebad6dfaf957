"""A file on its way: its bytes gather in a `.part` file beside its place, so that no half is taken for a
whole.

Knows files and hashes; knows nothing of where the bytes come from.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Self

_CHUNK = 2**20


class PartialFile:
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

    def move_to(self, path: Path) -> None:
        """On the disk first, then under its name: a power cut leaves a whole file or none."""
        os.fsync(self._file.fileno())
        self.path.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
