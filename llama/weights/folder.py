"""Which folder of weights is served, how the manifest fills and verifies it, and who gets the hub token.

Knows folders, the manifest and the settings; knows nothing of HTTP (`download.py`) or of tensors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llama.errors import BadCheckpoint, BadConfig, BadSettings, DamagedWeights, WeightsNotFound
from llama.settings import ROOT, Settings, expanded
from llama.weights.disk import PACKED, file_sha256, folder_lock
from llama.weights.embedded import embedded_folder
from llama.weights.file_checks import INDEX, file_names, find_fault, read_object
from llama.weights.manifest import Entry, path_in, read_manifest, rebase, write_hashes

if TYPE_CHECKING:
    from llama.weights.download import Source
    from llama.weights.retry import RetryPolicy

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_READERS = 4


def weights_folder(settings: Settings) -> Path:
    """An existing folder. Raises WeightsNotFound, naming what was looked for."""
    if settings.weights is None:
        return embedded_folder(settings.cache_dir)
    folder = expanded(settings.weights, "LLAMA_WEIGHTS")
    if not _is_folder(folder):
        raise WeightsNotFound(
            f"LLAMA_WEIGHTS is {folder}, which is not a folder; set it to one in Hugging Face format "
            "(config.json, safetensors, tokenizer), or set LLAMA_PULL to 1"
        )
    return folder


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - Path's own raises where it may not look


def folder_to_serve(settings: Settings) -> Path:
    """As `weights_folder`, filled first where LLAMA_PULL says so."""
    if settings.pull and settings.weights is not None:
        pull(expanded(settings.weights, "LLAMA_WEIGHTS"), settings)
    return weights_folder(settings)


def folder_to_fill(settings: Settings) -> Path:
    """Where the weights go when nobody says: where `cog.yaml` looks for them."""
    return expanded(settings.weights or ROOT / "weights" / "llama-2-70b-chat", "LLAMA_WEIGHTS")


def pull(folder: Path, settings: Settings, retry: RetryPolicy | None = None) -> int:
    """Bring the manifest's files that are not there whole; the number of files brought.

    One process at a time works in a folder, a second one waits. Raises BadManifest, DownloadFailed, DiskFull
    or DamagedWeights; what has come is kept, and another call goes on from there.
    """
    from llama.weights.download import download
    from llama.weights.retry import RetryPolicy

    _check_not_packed(folder)
    sources = _sources(folder, settings)
    with folder_lock(folder):
        return download(sources, folder, retry or RetryPolicy())


def _check_not_packed(folder: Path) -> None:
    """The files of a packed folder have the names of the manifest's, and are others."""
    with suppress(BadConfig):
        if PACKED in read_object(folder / "config.json"):
            raise BadSettings(f"{folder} holds packed weights, not the manifest's; set another folder")


def _sources(folder: Path, settings: Settings) -> list[Source]:
    from llama.weights.download import Source

    entries = read_manifest(settings.weights_manifest)
    base, token = settings.weights_base_url, _token(settings)
    wanted = rebase(entries, base) if base else entries
    return [
        Source(
            e.url,
            path_in(folder, e.destination),
            e.sha256,
            token if _token_allowed(e.url, home.url) else None,
        )
        for e, home in zip(wanted, entries, strict=True)
    ]


def _token(settings: Settings) -> str | None:
    if settings.hf_token is None:
        return None
    token = settings.hf_token.get_secret_value().strip()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise BadSettings("HF_TOKEN has characters that no token has; set it to the token alone")
    return token or None


def _token_allowed(url: str, home: str) -> bool:
    """Only a host that the manifest itself names, and not where others can listen."""
    parts = urlsplit(url)
    return parts[:2] == urlsplit(home)[:2] and (parts.scheme == "https" or parts.hostname in _LOOPBACK)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `verify` found."""

    faults: list[DamagedWeights]
    """In the manifest's order."""
    hashes: dict[str, str]
    """By destination, of the files that were hashed."""
    files: int


def verify(folder: Path, entries: Sequence[Entry], *, hash_all: bool = False) -> Inspection:
    """Look at every file: is it there, is its form sound, is its sha256 the manifest's where that has one.

    Raises WeightsNotFound when there is no folder; all other faults are returned.
    """
    if not _is_folder(folder):
        raise WeightsNotFound(f"{folder} is not a folder; `python -m llama weights pull` makes it")
    hashes: dict[str, str] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(lambda e: _fault(folder, e, hashes, hash_all), entries))
    faults = [f"{e.destination}: {fault}" for e, fault in zip(entries, found, strict=True) if fault]
    listed = {entry.destination for entry in entries}
    faults += [
        f"{name}: missing, and {INDEX} names it; pull with a manifest that lists it"
        for name in _indexed(folder)
        if name not in listed and not (folder / name).is_file()
    ]
    return Inspection([DamagedWeights(fault) for fault in faults], hashes, len(entries))


def lock(folder: Path, manifest: Path) -> Inspection:
    """Write the sha256 of every file into the manifest, when nothing is wrong with any.

    A hash that is there already must be the file's.
    """
    _check_not_packed(folder)
    entries = read_manifest(manifest)
    inspection = verify(folder, entries, hash_all=True)
    if not inspection.faults:
        write_hashes(manifest, entries, inspection.hashes)
    return inspection


def _fault(folder: Path, entry: Entry, hashes: dict[str, str], hash_all: bool) -> str | None:
    path = folder / entry.destination  # through links: only what writes must stay in the folder
    try:
        if not path.is_file():
            return "missing; pull again"
        fault = find_fault(path, path.name) if path.stat().st_size else "empty"
        if fault is None and (entry.sha256 or hash_all):
            hashes[entry.destination] = sha256 = file_sha256(path)
            if entry.sha256 not in (None, sha256):
                fault = f"its sha256 is {sha256} and not {entry.sha256}"
    except OSError as error:
        return f"cannot be read ({error.strerror}); let this user read it, or delete it and pull again"
    return fault and f"{fault}; delete it and pull again"


def _indexed(folder: Path) -> list[str]:
    """The shards that the index names; none without a readable one, which is a fault of its own."""
    with suppress(BadCheckpoint):
        return file_names(folder) if (folder / INDEX).is_file() else []
    return []
