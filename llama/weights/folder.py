"""The folder of weights that is served, and how it is filled and verified according to the manifest.

Knows folders, the manifest and the settings; knows nothing about HTTP (`download.py`) or tensors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llama.errors import BadCheckpoint, BadConfig, BadSettings, DamagedWeights, WeightsNotFound
from llama.settings import ROOT, Settings, expanded
from llama.weights.disk import file_sha256, folder_lock
from llama.weights.embedded import embedded_folder
from llama.weights.file_checks import INDEX, PACKED, file_names, find_fault, read_object
from llama.weights.manifest import Entry, path_in, read_manifest, rebase, write_hashes

if TYPE_CHECKING:
    from llama.weights.retry import RetryPolicy
    from llama.weights.transfer import Source

_READERS = 4


def weights_folder(settings: Settings) -> Path:
    """Return the folder of weights in the settings, or that of the embedded model.

    Raises WeightsNotFound if it does not exist.
    """
    if settings.weights is None:
        return embedded_folder(settings.cache_dir)
    folder = expanded(settings.weights, "LLAMA_WEIGHTS")
    if not _is_folder(folder):
        raise WeightsNotFound(
            f"LLAMA_WEIGHTS is {folder}, which is not a folder; set it to a folder in Hugging Face format "
            "(config.json, safetensors, tokenizer), or set LLAMA_PULL to 1 to download the files of the "
            "manifest at setup"
        )
    return folder


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises if permission is denied


def folder_to_serve(settings: Settings) -> Path:
    """Return the same folder as `weights_folder`, after pulling into it if LLAMA_PULL is set."""
    if settings.pull and settings.weights is not None:
        pull(expanded(settings.weights, "LLAMA_WEIGHTS"), settings)
    return weights_folder(settings)


def folder_to_fill(settings: Settings) -> Path:
    """Return the folder to pull into: LLAMA_WEIGHTS, or the folder that `cog.yaml` serves."""
    return expanded(settings.weights or ROOT / "weights" / "llama-2-70b-chat", "LLAMA_WEIGHTS")


def pull(folder: Path, settings: Settings, retry: RetryPolicy | None = None) -> int:
    """Download the files of the manifest that are missing or wrong. Returns the number of downloaded files.

    Only one process at a time pulls into a folder; a second one waits. Raises BadManifest, BadSettings,
    DownloadFailed, DiskFull or DamagedWeights. Complete files are kept, and another call downloads the rest.
    """
    from llama.weights.download import download
    from llama.weights.retry import RetryPolicy

    _check_not_packed(folder)
    sources, token = _sources(folder, settings), _token(settings)
    with folder_lock(folder):
        return download(sources, folder, retry or RetryPolicy(), token)


def _check_not_packed(folder: Path) -> None:
    """Raises BadSettings for a packed folder: its files have the manifest's names, but other contents."""
    config = folder / "config.json"
    with suppress(BadConfig):
        if os.path.isfile(config) and PACKED in read_object(config):  # noqa: PTH113 - see _is_folder
            raise BadSettings(
                f"{folder} contains packed weights, not the files of the manifest; choose another folder"
            )


def _sources(folder: Path, settings: Settings) -> list[Source]:
    from llama.weights.transfer import Source

    entries = read_manifest(manifest_path(settings))
    if settings.weights_base_url:
        entries = rebase(entries, settings.weights_base_url)
    return [Source(e.url, path_in(folder, e.destination), e.sha256) for e in entries]


def manifest_path(settings: Settings) -> Path:
    """Return the manifest in the settings. Raises BadSettings if its `~` cannot be expanded."""
    return expanded(settings.weights_manifest, "LLAMA_WEIGHTS_MANIFEST")


def _token(settings: Settings) -> str | None:
    if settings.hf_token is None:
        return None
    token = settings.hf_token.get_secret_value().strip()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise BadSettings("HF_TOKEN contains characters that no token has; set it to the token alone")
    return token or None


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of `verify`."""

    faults: list[DamagedWeights]
    """In the order of the manifest."""
    hashes: dict[str, str]
    """The SHA-256 of every file that was hashed, by destination."""
    files: int
    """The number of files in the manifest."""


def verify(folder: Path, settings: Settings) -> Inspection:
    """Check that every file of the manifest exists, has a valid format, and matches the manifest's SHA-256.

    Raises BadManifest, WeightsNotFound if there is no folder, and BadSettings if the folder is packed or the
    manifest's `~` cannot be expanded; all other faults are returned.
    """
    _check_not_packed(folder)
    return _inspect(folder, read_manifest(manifest_path(settings)), hash_all=False)


def lock(folder: Path, settings: Settings) -> Inspection:
    """Verify the folder and write the SHA-256 of every file into the manifest.

    If any file has a fault, including a hash that differs from the manifest's, the manifest is not changed.
    Raises the same errors as `verify`.
    """
    _check_not_packed(folder)
    manifest = manifest_path(settings)
    entries = read_manifest(manifest)
    inspection = _inspect(folder, entries, hash_all=True)
    if not inspection.faults:
        write_hashes(manifest, entries, inspection.hashes)
    return inspection


def _inspect(folder: Path, entries: Sequence[Entry], *, hash_all: bool) -> Inspection:
    if not _is_folder(folder):
        raise WeightsNotFound(
            f"{folder} does not exist or is not a folder; create it with "
            f"`python -m llama weights pull {folder}`"
        )
    hashes: dict[str, str] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(lambda e: _fault(folder, e, hashes, hash_all), entries))
    faults = [f"{e.destination} {fault}" for e, fault in zip(entries, found, strict=True) if fault]
    listed = {entry.destination for entry in entries}
    faults += [
        f"{name} is missing, but {INDEX} names it; pull with a manifest that lists it"
        for name in _indexed(folder)
        if name not in listed and not os.path.isfile(folder / name)  # noqa: PTH113 - see _is_folder
    ]
    return Inspection([DamagedWeights(fault) for fault in faults], hashes, len(entries))


def _fault(folder: Path, entry: Entry, hashes: dict[str, str], hash_all: bool) -> str | None:
    path = folder / entry.destination  # a link out of the folder is fine, because nothing is written
    try:
        if not path.is_file():
            return "is missing; run `weights pull`"
        fault = find_fault(path, path.name) if path.stat().st_size else "is empty"
        if fault is None and (entry.sha256 or hash_all):
            hashes[entry.destination] = sha256 = file_sha256(path)
            if entry.sha256 not in (None, sha256):
                fault = f"has the SHA-256 {sha256} instead of {entry.sha256}"
    except OSError as error:
        return f"cannot be read ({error.strerror}); make it readable, or delete it and run `weights pull`"
    return fault and f"{fault}; delete it and run `weights pull`"


def _indexed(folder: Path) -> list[str]:
    """Return the shards that the index names; none if the index is missing or not valid."""
    with suppress(BadCheckpoint):
        return file_names(folder) if (folder / INDEX).is_file() else []
    return []
