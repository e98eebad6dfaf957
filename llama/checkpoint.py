"""The tensors of a folder in Hugging Face format, one file after the other.

Safetensors only. One file is mapped at a time, so that a process never holds more of a checkpoint than
the largest file. Knows files, headers and names; knows nothing of models or devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama.errors import BadCheckpoint
from llama.form import file_names


class Checkpoint:
    """The safetensors files of a folder, all there and whole."""

    def __init__(self, folder: Path) -> None:
        """Reads headers only. Raises BadCheckpoint naming the file at fault."""
        self.files = [folder / name for name in file_names(folder)]
        self.names: frozenset[str] = frozenset().union(*map(_tensor_names, self.files))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)

    def tensors(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of one of the files. A tensor's memory is the file's own: it is to be copied."""
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise BadCheckpoint(f"{path} cannot be read ({error}); copy it again") from error


def _tensor_names(path: Path) -> list[str]:
    if not path.is_file():
        raise BadCheckpoint(
            f"{path} is not there; copy the model's safetensors files (no other kind is read)"
        )
    try:
        # The header says how long the file must be.
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(f"{path} is damaged or cut short ({error}); copy it again") from error
