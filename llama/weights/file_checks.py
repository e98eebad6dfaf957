"""The names of a checkpoint's files, and checks of their format that do not load them.

Knows safetensors headers and JSON; knows nothing about manifests or networks.
"""

from __future__ import annotations

import codecs
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from llama.errors import BadCheckpoint, BadConfig, WeightsError

_TOKENIZER_FILES = (".json", ".jinja", ".txt", ".model")

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

PACKED = "packed_by_weights_pack"
"""The key in `config.json` that marks a folder written by `weights pack`."""


def read_object(path: Path, kind: type[WeightsError] = BadConfig) -> dict[str, Any]:
    """Read a JSON object from a file. Raises `kind` if it is missing or unreadable, or has other contents."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise kind(f"{path} is missing; copy the complete folder of the model") from error
    except OSError as error:
        raise kind(
            f"{path} cannot be read ({error.strerror or type(error).__name__}); copy it again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise kind(f"{path} is not valid JSON ({error}); copy it again") from error
    if not isinstance(raw, dict):
        raise kind(f"{path} does not contain a JSON object; copy it again")
    return raw


def named_ends(folder: Path) -> Iterator[tuple[Path, Any]]:
    """Yield the files that name the tokens that end an answer, each with its `eos_token_id`, in the order of
    precedence."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        named = read_object(path).get("eos_token_id") if path.is_file() else None
        if named is not None:
            yield path, named


@contextmanager
def without_byte_order_marks(folder: Path) -> Iterator[Path]:
    """Yield the folder itself or, if any text file in it begins with a byte order mark, a temporary copy of
    the tokenizer's files without the marks, for libraries that do not skip a mark."""
    files = [
        path for path in (*folder.iterdir(), *folder.glob("*/*.jinja")) if path.suffix in _TOKENIZER_FILES
    ]
    if not any(_has_mark(path) for path in files):
        yield folder
        return
    with tempfile.TemporaryDirectory() as copies:
        for path in filter(Path.is_file, files):
            copied = Path(copies) / path.relative_to(folder)
            copied.parent.mkdir(exist_ok=True)
            copied.write_bytes(path.read_bytes().removeprefix(codecs.BOM_UTF8))
        yield Path(copies)


def _has_mark(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
    return False


def file_names(folder: Path) -> list[str]:
    """Return the names of a folder's safetensors files, sorted: those in the index, or the single file.

    Raises BadCheckpoint if the index is not valid.
    """
    index = folder / INDEX
    if not index.is_file():
        return [SINGLE]
    weight_map = read_object(index, BadCheckpoint).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadCheckpoint(f"{index} does not name any files; copy it again")
    return sorted(set(weight_map.values()))


def find_fault(path: Path, name: str) -> str | None:
    """Check that a file has the format of the suffix of `name`. Returns what is wrong, as the end of a
    sentence, or None."""
    suffix = PurePosixPath(name).suffix
    if suffix == ".safetensors":
        return _find_safetensors_fault(path)
    if suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError):
            return "is not valid JSON"
    return None


def _find_safetensors_fault(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return None
    except SafetensorError as error:
        size, wanted = path.stat().st_size, _safetensors_size(path)
        if wanted is not None and size != wanted:
            return f"has {size} bytes, but its header describes {wanted}"
        return f"has no valid safetensors header ({error})"


def _safetensors_size(path: Path) -> int | None:
    """The file size that the header describes: 8 bytes for its own length, the header, and the tensors."""
    with path.open("rb") as file, suppress(ValueError, TypeError, KeyError, AttributeError):
        length = int.from_bytes(file.read(8), "little")
        if length < path.stat().st_size:
            header = json.loads(file.read(length))
            tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
            return 8 + length + max(int(tensor["data_offsets"][1]) for tensor in tensors)
    return None
