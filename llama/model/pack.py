"""Quantize a checkpoint once, so that later starts read a half or a quarter of it.

What is written is in the form that transformers reads too, and vLLM in FP8. One file of the source is in
memory at a time. Knows checkpoints and layers; knows nothing of serving.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llama.errors import BadCheckpoint, BadSettings, DiskFull, DoesNotFit
from llama.model.checkpoint import Checkpoint
from llama.model.config import load_config
from llama.model.precision_plan import bytes_of_weights
from llama.model.quantized_layers import Quantization, quantize, to_config, to_stored
from llama.weights.disk import LOCK, PACKED, disk_errors, folder_lock
from llama.weights.file_checks import INDEX, SINGLE, read_object
from llama.weights.manifest import is_read

logger = logging.getLogger(__name__)

_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")


def pack(source: Path, target: Path, quantization: Quantization, device: torch.device) -> None:
    """Write the model of `source` in `quantization` to a new folder, complete or not at all.

    Raises BadSettings when `target` is there already, DiskFull, and what reading `source` raises.
    """
    _check_new(target)
    if getattr(load_config(source), "quantization_config", None):
        raise BadSettings(f"{source} is quantized already; set LLAMA_WEIGHTS to plain weights")
    checkpoint = Checkpoint(source)
    part = target.with_name(f"{target.name}.part")
    with folder_lock(part), disk_errors(part):
        _check_new(target)  # another process may have written it while this one waited
        for left in part.iterdir():
            if left.name != LOCK:
                left.unlink()
        _check_disk(source, part, quantization)
        try:
            _write(checkpoint, source, part, quantization, device)
        except torch.OutOfMemoryError as error:
            raise DoesNotFit(
                f"{device} has no room for one layer ({error}); set LLAMA_DEVICE to cpu"
            ) from error
        mode = (part / "config.json").stat().st_mode
        for path in part.glob("*.safetensors"):
            path.chmod(mode)  # safetensors lets nobody else read what it writes
        for path in [*part.iterdir(), part]:
            _to_disk(path)  # before it has its name: a power cut leaves a whole folder or none
        part.rename(target)
        (target / LOCK).unlink()


def _check_new(target: Path) -> None:
    if target.exists():
        raise BadSettings(f"{target} is there already; set another folder to pack into")


def _check_disk(source: Path, part: Path, quantization: Quantization) -> None:
    wanted, free = bytes_of_weights(load_config(source), quantization), shutil.disk_usage(part).free
    if wanted > free:
        raise DiskFull(
            f"{wanted / 1e9:.1f} GB are to be written and the disk of {part} has {free / 1e9:.1f} GB free; "
            f"free {(wanted - free) / 1e9:.1f} GB more or pack to another disk"
        )


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(
    checkpoint: Checkpoint, source: Path, part: Path, quantization: Quantization, device: torch.device
) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for number, path in enumerate(checkpoint.files, start=1):
        tensors = _packed(checkpoint, path, quantization, device)
        _save(tensors, part / path.name)
        weight_map |= dict.fromkeys(tensors, path.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        logger.info("packed %s, %d of %d", path.name, number, len(checkpoint.files))
    if [path.name for path in checkpoint.files] != [SINGLE]:
        _write_json(part / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _copy_the_rest(source, part, quantization)


@torch.inference_mode()
def _packed(
    checkpoint: Checkpoint, path: Path, quantization: Quantization, device: torch.device
) -> dict[str, Tensor]:
    """The tensors of a file, its linear layers quantized, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors(path):
        if not _LINEAR.fullmatch(name):
            tensors[name] = tensor.clone()
            continue
        layer = quantize(tensor.to(device), None, quantization, tensor.dtype)
        owner = name.removesuffix(".weight")
        tensors |= {f"{owner}.{part}": stored.cpu() for part, stored in to_stored(layer).items()}
    return tensors


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:  # which tells a full disk by its text alone
        raise DiskFull(f"{path} cannot be written ({error}); free some room and pack again") from error


def _copy_the_rest(source: Path, target: Path, quantization: Quantization) -> None:
    """Tokenizer, licence and configurations; the weights, and what they were stored as, stay behind."""
    for path in source.iterdir():
        ours = path.suffix == ".safetensors" or path.name in (INDEX, "config.json")
        if path.is_file() and is_read(path.name) and not ours:
            (target / path.name).write_bytes(_read(path))
    config = read_object(source / "config.json")
    config |= {"quantization_config": to_config(quantization), PACKED: quantization}
    _write_json(target / "config.json", config)


def _read(path: Path) -> bytes:
    """A small file of the source. Its faults are the source's, and not the target's."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadCheckpoint(
            f"{path} cannot be read ({error.strerror}); let this user read it, or copy it again"
        ) from error


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
