"""The tensors of a folder in Hugging Face format, one file after the other.

Safetensors only. One file is mapped at a time, so that a process never holds more of a checkpoint than
the largest file. Knows files, headers and names; knows nothing of models or devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama.errors import BadCheckpoint
from llama.weights.file_checks import file_names

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


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

    @cached_property
    def has_head_of_its_own(self) -> bool:
        """Whether an output layer is stored that differs from the embeddings. transformers then uses it, even
        if config.json says that the two are tied; so does every engine here."""
        if not {HEAD, EMBEDDINGS} <= self.names:
            return False
        head, embeddings = (
            next(tensor for path in self.files for name, tensor in self.tensors(path) if name == wanted)
            for wanted in (HEAD, EMBEDDINGS)
        )
        return not torch.equal(head, embeddings)

    @property
    def has_only_the_head(self) -> bool:
        """Whether an output layer is stored and no embeddings."""
        return HEAD in self.names and EMBEDDINGS not in self.names

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
