"""Layers that are packed directly from the files of a checkpoint, while the next ones are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import write_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llama.errors import BadCheckpoint
from llama.model.config import load_config
from llama.model.loader import load_model
from llama.model.placement import Placement
from llama.torch_engine.layer_packing import load_parts
from llama.torch_engine.layers import ModelParts, take_apart, take_layer
from llama.torch_engine.linears import Scratch

LAYERS = 5
MAPS = Path("/proc/self/maps")
needs_maps = pytest.mark.skipif(not MAPS.is_file(), reason="only Linux lists the mapped files in /proc")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in several files, with layers that are divided between two files."""
    return written(tmp_path / "weights", torch.float32)


def written(
    folder: Path, stored: torch.dtype, file_of: Callable[[int], int] = lambda i: i // 7, **shape: Any
) -> Path:
    """Write a checkpoint in several files. `file_of` gives the number of the file for the n-th tensor."""
    write_model(folder, num_hidden_layers=LAYERS, **shape)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files: dict[str, dict[str, Tensor]] = {}
    for number, name in enumerate(sorted(tensors)):
        path = f"model-{file_of(number)}.safetensors"
        files.setdefault(path, {})[name] = tensors[name].to(stored)
    for path, content in files.items():
        save_file(content, folder / path, metadata={"format": "pt"})
    index: dict[str, Any] = {"metadata": {}}
    index["weight_map"] = {name: path for path, content in files.items() for name in content}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def placement(dtype: torch.dtype) -> Placement:
    return Placement(torch.device("cpu"), dtype, "none", 128)


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> ModelParts:
    return load_parts(folder, load_config(folder), placement(dtype))


def mapped_files(folder: Path) -> set[str]:
    return {line.split()[-1] for line in MAPS.read_text().splitlines() if f"{folder}/" in line}


@torch.inference_mode()
def outputs(parts: ModelParts) -> list[Tensor]:
    """The results of every linear layer and the head for the same input, and the embeddings of some tokens."""
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).to(parts.dtype)
    results = [parts.head(x[:, :64].contiguous()), parts.embedding(torch.arange(7))]
    for layer in parts.layers:
        for module, width in ((layer.qkv, 64), (layer.output, 128), (layer.gate_up, 64), (layer.down, 128)):
            results.append(module(x[:, :width].contiguous()))
    return results


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [{}, {"attention_bias": True}, {"mlp_bias": True, "tie_word_embeddings": True}], ids=str
)
def test_packed_layers_equal_those_of_a_model_that_transformers_loads(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype, shape: dict[str, Any]
) -> None:
    folder = written(tmp_path / "weights", stored, **shape)
    reference = take_apart(LlamaForCausalLM.from_pretrained(folder, dtype=dtype), placement(dtype))
    parts = loaded(folder, dtype)
    assert len(parts.layers) == LAYERS
    assert parts.scale == reference.scale
    for got, wanted in zip(outputs(parts), outputs(reference), strict=True):
        assert torch.equal(got, wanted)


@needs_maps
def test_no_file_stays_mapped(folder: Path) -> None:
    parts = loaded(folder)
    assert parts.layers
    assert not mapped_files(folder)


def test_overwriting_the_files_after_loading_does_not_change_the_model(folder: Path) -> None:
    parts = loaded(folder)
    before = outputs(parts)
    for path in folder.glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    for got, wanted in zip(outputs(parts), before, strict=True):
        assert torch.equal(got, wanted)


@needs_maps
@pytest.mark.parametrize("files", [2, 9])
def test_one_file_is_mapped_at_a_time_even_if_layers_are_spread_over_all_files(
    tmp_path: Path, files: int
) -> None:
    folder = written(tmp_path / "weights", torch.float32, lambda number: number % files)
    most, layers = list[int](), {}

    def take(modules: nn.ModuleList, index: int) -> None:
        most.append(len(mapped_files(folder)))
        layers[index] = take_layer(modules, index, torch.float32, Scratch())

    load_model(folder, load_config(folder), placement(torch.float32), take)
    assert sorted(layers) == list(range(LAYERS))
    assert max(most) <= 1
    assert not mapped_files(folder)


def test_the_number_of_threads_is_the_same_after_loading(folder: Path) -> None:
    before = torch.get_num_threads()
    loaded(folder)
    assert torch.get_num_threads() == before
    path = folder / "model-3.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("proj.weight"))
    save_file({**tensors, name: tensors[name][:3].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match="has 1 tensor of the wrong shape"):
        loaded(folder)
    assert torch.get_num_threads() == before
