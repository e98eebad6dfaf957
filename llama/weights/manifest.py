"""The manifest of weights: lines of `URL DESTINATION`, the format of Replicate's `pget multifile`.

A hash is stored in the fragment of the URL, `#sha256=<hex>`, which no client sends to a server. Knows the
format, and which files are allowed where in a folder; knows nothing about networks or models.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import SplitResult, quote, urlsplit, urlunsplit

from llama.errors import BadManifest, BadSettings

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"sha256=([0-9a-f]{64})")
_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".md")
_TOKENIZER = "tokenizer.model"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file in the manifest."""

    url: str
    """Without a fragment. It may contain a signature, so no message quotes it."""
    destination: str
    """The path inside the folder."""
    sha256: str | None = None

    def __str__(self) -> str:
        fragment = f"#sha256={self.sha256}" if self.sha256 else ""
        return f"{self.url}{fragment} {self.destination}"


def read_manifest(path: Path) -> list[Entry]:
    """Return the entries in order, at least one. Raises BadManifest for the first line that is not valid."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise BadManifest(
            f"{path} cannot be read ({reason}); set LLAMA_WEIGHTS_MANIFEST to a file of "
            "`URL DESTINATION` lines"
        ) from error
    entries: dict[str, Entry] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = _entry(line.removeprefix("\ufeff").split())
            if entry.destination in entries:
                raise ValueError(f"{entry.destination} is listed twice; remove one of the lines")
        except ValueError as error:
            raise BadManifest(f"{path} line {number}: {error}") from error
        entries[entry.destination] = entry
    if not entries:
        raise BadManifest(f"{path} lists no files; write one `URL DESTINATION` per line")
    return list(entries.values())


def _entry(fields: list[str]) -> Entry:
    """Parse the fields of a line. Raises ValueError without quoting the URL, which may have a signature."""
    if len(fields) != 2:
        raise ValueError(f"expected 2 fields, got {len(fields)}; write `URL DESTINATION` without comments")
    url, destination = fields
    _check_destination(destination)
    parts = split_http_url(url)
    if parts is None:
        raise ValueError(f"the URL of {destination} is not valid; write https://HOST/PATH")
    hashed = _SHA256.fullmatch(parts.fragment.lower())
    if parts.fragment and not hashed:
        raise ValueError(
            f"the URL of {destination} has a fragment that is not #sha256=<64 hex digits>; correct or "
            "remove it"
        )
    return Entry(urlunsplit(parts._replace(fragment="")), destination, hashed[1] if hashed else None)


def split_http_url(url: str) -> SplitResult | None:
    """Parse an HTTP or HTTPS URL. Returns None for anything else."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("https", "http") and parts.hostname and parts.port != 0
    except ValueError:
        return None
    return parts if known and url.isascii() and url.isprintable() else None


def is_read(name: str) -> bool:
    """Whether a file has a type that this package reads. Pickles and code are never read."""
    path = PurePosixPath(name)
    return path.suffix in _SUFFIXES or path.name == _TOKENIZER


def _check_destination(destination: str) -> None:
    if not all(_PART.fullmatch(part) for part in destination.split("/")):
        raise ValueError(
            f"the destination {destination!a} is not a valid path inside the folder; write a relative path "
            "of letters, digits, `.`, `_` and `-`, in which no name begins with `.` or `-`"
        )
    if not is_read(destination):
        raise ValueError(
            f"{destination} is of a type that is never read; remove the line (allowed types: "
            f"{', '.join(_SUFFIXES)} and {_TOKENIZER})"
        )


def rebase(entries: Iterable[Entry], base_url: str) -> list[Entry]:
    """Return the same files with URLs below `base_url`, where each is stored under its destination.

    Raises BadSettings if `base_url` is not valid.
    """
    base = split_http_url(base_url)
    if base is None or base.fragment:
        raise BadSettings("LLAMA_WEIGHTS_BASE_URL is not the URL of a folder; set it to https://HOST/PATH")
    folder = base.path.rstrip("/")
    return [
        replace(e, url=urlunsplit(base._replace(path=f"{folder}/{quote(e.destination)}"))) for e in entries
    ]


def path_in(folder: Path, destination: str) -> Path:
    """Return the path of a destination. Raises BadManifest if a symbolic link leads out of the folder."""
    path = folder / destination
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # a link to itself, or a deleted current folder
        raise BadManifest(f"{path} cannot be resolved ({error}); remove the link") from error
    if not inside:
        raise BadManifest(
            f"{path} is, or is below, a symbolic link that leads out of {folder}; remove the link"
        )
    return path


def write_hashes(path: Path, entries: Iterable[Entry], hashes: Mapping[str, str]) -> None:
    """Write the hashes, given by destination, into the manifest atomically. Raises BadManifest."""
    lines = [f"{replace(entry, sha256=hashes[entry.destination])}\n" for entry in entries]
    path = path.resolve()  # a link stays, and its target is written
    try:
        if not path.is_file():
            raise OSError(errno.EINVAL, "not a regular file")
        mode = path.stat().st_mode & 0o777
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f"{path.name}.", delete=False
        ) as file:
            part = Path(file.name)
            try:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
                part.chmod(mode)
                part.replace(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise BadManifest(
            f"{path} cannot be written ({error.strerror}); make it writable, or set "
            "LLAMA_WEIGHTS_MANIFEST to a copy"
        ) from error
