"""The page's own files: their contents, types and entity tags.

All files are read when the application is created, so a request can name only a file that exists, and a
gateway serves one version of the page even while the package is being replaced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "static"
INDEX = "index.html"

# The types of the `mimetypes` module depend on the system.
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Files with other endings, such as the backup copies of an editor, are not served."""


@dataclass(frozen=True)
class PageFile:
    """A file as it is sent."""

    content: bytes
    media_type: str
    etag: str
    """It depends on the content only: in a package, all files have the same modification time."""


def page_files(folder: Path = FOLDER) -> Mapping[str, PageFile]:
    """Return the files of a folder by their names. Files in folders have names such as `icons/copy.svg`."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix in _TYPES)
    return {path.relative_to(folder).as_posix(): _read(path) for path in paths}


def _read(path: Path) -> PageFile:
    content = path.read_bytes()
    etag = hashlib.sha256(content).hexdigest()[:32]
    return PageFile(content, _TYPES[path.suffix], f'"{etag}"')
