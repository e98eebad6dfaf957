"""A file to download: what downloads from the hub and from other servers have in common.

Knows sizes, hashes and paths; knows nothing about networks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from llama.errors import DamagedWeights, DownloadFailed
from llama.weights.file_checks import find_fault


@dataclass(frozen=True, slots=True)
class Source:
    """A file that the manifest lists."""

    url: str
    path: Path
    """Where the file belongs."""
    sha256: str | None
    """The hash in the manifest."""

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(slots=True)
class Transfer(ABC):
    """A file to download, after a server has described it."""

    source: Source
    size: int | None
    """None if the server did not send it."""
    sha256: str | None
    """The hash that the file must have: the manifest's, or the server's; None if neither is known."""
    received: int = field(default=0, init=False)
    """The number of bytes that have been downloaded."""

    @property
    def missing(self) -> int:
        return max(0, (self.size or 0) - self.received)

    @property
    def part(self) -> Path | None:
        """The file beside the destination that a later pull resumes, if there is one."""
        return None

    @abstractmethod
    def fetch(self) -> str:
        """Download the file, verify it and move it into place. Returns its SHA-256.

        Raises DownloadFailed, DamagedWeights, OSError, or Stopped.
        """

    def check_verifiable(self) -> None:
        """Raises DownloadFailed if neither the size nor the hash is known."""
        if self.size is None and self.sha256 is None:
            raise DownloadFailed(
                f"{self.source.name}: the server sent neither a length nor a hash, so the download cannot be "
                "verified; add #sha256=<hash> to the URL in the manifest"
            )

    def fault_of(self, path: Path, size: int, sha256: str) -> str | None:
        """Return what is wrong with a downloaded file, as the end of a sentence, or None."""
        if self.size is not None and size != self.size:
            return f"has {size} bytes instead of {self.size}"
        if self.sha256 is not None:
            return None if sha256 == self.sha256 else f"has the SHA-256 {sha256} instead of {self.sha256}"
        # Without a hash, check the format at least, which finds the error page of a proxy.
        return find_fault(path, self.source.name)

    def damaged(self, fault: str) -> DamagedWeights:
        return DamagedWeights(
            f"{self.source.name}: the downloaded file {fault}; pull again, and if this happens again, "
            "replace the file on the server or correct the manifest"
        )
