"""Reads the tensors of a folder in Hugging Face format, one file after another.

Only safetensors files are read. One file is mapped at a time, so a process never maps more of a checkpoint
than the largest file. Knows files, headers and tensor names; knows nothing about models or devices.
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
    """The safetensors files of a folder, all of which exist and are complete."""

    def __init__(self, folder: Path) -> None:
        """Read the headers only. Raises BadCheckpoint, which names the file that is missing or damaged."""
        self.files = [folder / name for name in file_names(folder)]
        self.names: frozenset[str] = frozenset().union(*map(_tensor_names, self.files))

    @property
    def size(self) -> int:
        """Size of all files in bytes."""
        return sum(path.stat().st_size for path in self.files)

    @cached_property
    def has_head_of_its_own(self) -> bool:
        """Whether the checkpoint stores an output layer that differs from the embeddings. transformers then
        uses it even if config.json ties it to the embeddings, and so does every engine of this project."""
        if not {HEAD, EMBEDDINGS} <= self.names:
            return False
        head, embeddings = (
            next(tensor for path in self.files for name, tensor in self.tensors(path) if name == wanted)
            for wanted in (HEAD, EMBEDDINGS)
        )
        return not torch.equal(head, embeddings)

    @property
    def has_only_the_head(self) -> bool:
        """Whether the checkpoint stores an output layer but no embeddings."""
        return HEAD in self.names and EMBEDDINGS not in self.names

    def tensors(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and tensors of one file. The tensors are views of the mapped file: copy them."""
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - `file` is not a mapping
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise BadCheckpoint(f"{path} cannot be read ({error}); copy it again") from error


def _tensor_names(path: Path) -> list[str]:
    if not path.is_file():
        raise BadCheckpoint(
            f"{path} does not exist; copy the model's safetensors files (other formats are not read)"
        )
    try:
        # Opening the file compares its length with the one that its header states.
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(f"{path} is damaged or truncated ({error}); copy it again") from error
