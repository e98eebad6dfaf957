"""A cache of SHA-256 hashes, so that a start does not read 138 GB only to hash them.

A hash is valid while the size and the modification time of its file stay the same, as in git's index.
`verify` does not use the cache. Knows files and hashes; knows nothing about what a hash should be.
"""

from __future__ import annotations

import json
import logging
import threading
from contextlib import suppress
from pathlib import Path

from llama.weights.disk import file_sha256

logger = logging.getLogger(__name__)

_NAME = ".sha256-cache"


class HashCache:
    """The hashes of the files in one folder, whose lock the caller holds. Any thread may use it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME
        self._lock = threading.Lock()
        self._known: dict[str, list[int | str]] = {}
        with suppress(OSError, ValueError):
            raw = json.loads(self._path.read_text(encoding="utf-8"))
            self._known = raw if isinstance(raw, dict) else {}
        self._saved = dict(self._known)

    def sha256(self, path: Path) -> str:
        """Return the hash of an existing file. May raise OSError."""
        known = self._known.get(self._key(path))
        if isinstance(known, list) and known[:2] == _state(path) and len(known) == 3:
            return str(known[2])
        logger.info("%s exists; checking its SHA-256", path.name)
        sha256 = file_sha256(path)
        self.add(path, sha256)
        return sha256

    def add(self, path: Path, sha256: str) -> None:
        """Store the hash of a file in its present state."""
        with self._lock:
            self._known[self._key(path)] = [*_state(path), sha256]

    def save(self) -> None:
        """Write the cache to the folder if it has changed. A cache that cannot be written is discarded."""
        with self._lock:
            known = dict(self._known)
        if known == self._saved:
            return
        part = self._path.with_name(f"{_NAME}.part")
        with suppress(OSError):
            part.write_text(json.dumps(known, indent=0), encoding="utf-8")
            part.replace(self._path)
            self._saved = known

    def _key(self, path: Path) -> str:
        return path.relative_to(self._path.parent).as_posix()


def _state(path: Path) -> list[int | str]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
