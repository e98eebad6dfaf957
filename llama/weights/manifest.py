"""The manifest of weights: one `URL DESTINATION` a line, as Replicate's `pget multifile` reads it.

A hash rides in the URL's fragment, `#sha256=<hex>`, which no client sends to a server. Knows the format,
which kinds of files may come, and where in a folder they may go; knows nothing of networks or models.
"""

from __future__ import annotations

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
    """One file: where it comes from, its place in the folder, and its hash where that is known."""

    url: str
    """Without a fragment. It may carry a signature, so it is in no message."""
    destination: str
    sha256: str | None = None

    def __str__(self) -> str:
        fragment = f"#sha256={self.sha256}" if self.sha256 else ""
        return f"{self.url}{fragment} {self.destination}"


def read_manifest(path: Path) -> list[Entry]:
    """The entries in order, at least one. Raises BadManifest naming the first line that cannot be used."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadManifest(
            f"{path} cannot be read ({type(error).__name__}); set LLAMA_WEIGHTS_MANIFEST to a file of "
            "`URL DESTINATION` lines"
        ) from error
    entries: dict[str, Entry] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = _entry(line.removeprefix("\ufeff").split())
            if entry.destination in entries:
                raise ValueError(f"{entry.destination} is there twice; remove one of the lines")
        except ValueError as error:
            raise BadManifest(f"{path} line {number}: {error}") from error
        entries[entry.destination] = entry
    if not entries:
        raise BadManifest(f"{path} names no file; write one `URL DESTINATION` a line")
    return list(entries.values())


def _entry(fields: list[str]) -> Entry:
    """Raises ValueError. The URL is never quoted: it may carry a signature."""
    if len(fields) != 2:
        raise ValueError(
            f"{len(fields)} fields; write `URL DESTINATION` with one space between, and no comments"
        )
    url, destination = fields
    _check_destination(destination)
    parts = _split(url)
    if parts is None:
        raise ValueError(f"the URL of {destination} is not one; write https://HOST/PATH")
    hashed = _SHA256.fullmatch(parts.fragment.lower())
    if parts.fragment and not hashed:
        raise ValueError(f"the URL of {destination} has a fragment that is not #sha256=<64 hex digits>")
    return Entry(urlunsplit(parts._replace(fragment="")), destination, hashed[1] if hashed else None)


def _split(url: str) -> SplitResult | None:
    """None for what is no address on the web."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("https", "http") and parts.hostname and parts.port != 0
    except ValueError:
        return None
    return parts if known and url.isascii() and url.isprintable() else None


def is_read(name: str) -> bool:
    """Whether a file is of a kind that belongs to a model: never pickles, never code."""
    path = PurePosixPath(name)
    return path.suffix in _SUFFIXES or path.name == _TOKENIZER


def _check_destination(destination: str) -> None:
    if not all(_PART.fullmatch(part) for part in destination.split("/")):
        raise ValueError(
            f"the destination {destination!a} is not a path inside the folder; write a relative path of "
            "letters, digits, `.`, `_` and `-`"
        )
    if not is_read(destination):
        raise ValueError(
            f"{destination} is of a kind that is not read; leave it out ({', '.join(_SUFFIXES)} and "
            f"{_TOKENIZER} are)"
        )


def rebase(entries: Iterable[Entry], base_url: str) -> list[Entry]:
    """The same files from another place, where each lies under its destination. Raises BadSettings."""
    base = _split(base_url)
    if base is None or base.fragment:
        raise BadSettings("LLAMA_WEIGHTS_BASE_URL is no URL of a folder; set it to https://HOST/PATH")
    folder = base.path.rstrip("/")
    return [
        replace(e, url=urlunsplit(base._replace(path=f"{folder}/{quote(e.destination)}"))) for e in entries
    ]


def path_in(folder: Path, destination: str) -> Path:
    """Where a destination lies. Raises BadManifest when a symbolic link would lead out of the folder."""
    path = folder / destination
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BadManifest(
            f"{path} is a symbolic link, or lies behind one, that leads out of {folder}; remove the link"
        )
    return path


def write_hashes(path: Path, entries: Iterable[Entry], hashes: Mapping[str, str]) -> None:
    """Put the hashes, by destination, into the manifest, in one step. Raises BadManifest."""
    lines = [f"{replace(entry, sha256=hashes[entry.destination])}\n" for entry in entries]
    try:
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
