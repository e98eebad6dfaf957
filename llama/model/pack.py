"""Quantizes a checkpoint once, so that later starts read only a half or a quarter of the bytes.

The packed checkpoint is in the format of transformers; vLLM also reads it if it is in FP8. One file of the
source is in memory at a time. Knows checkpoints and layers; knows nothing about serving.
"""

from __future__ import annotations

import json
import logging
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
from llama.model.gpu_errors import is_out_of_memory
from llama.model.precision_plan import bytes_of_weights
from llama.model.quantized_layers import Quantization, quantize, to_config, to_stored
from llama.weights.disk import LOCK, disk_errors, folder_lock, sync
from llama.weights.file_checks import INDEX, PACKED, SINGLE, read_object
from llama.weights.manifest import is_read

logger = logging.getLogger(__name__)

_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")


def pack(source: Path, target: Path, quantization: Quantization, device: torch.device) -> None:
    """Write the model of `source`, quantized to `quantization`, to the new folder `target`.

    `target` appears only when it is complete. Raises BadSettings if `target` exists or `source` is quantized,
    DiskFull, DoesNotFit, and the errors of reading `source`.
    """
    _check_new(target)
    if getattr(load_config(source), "quantization_config", None):
        raise BadSettings(f"{source} is already quantized; set LLAMA_WEIGHTS to unquantized weights")
    checkpoint = Checkpoint(source)
    part = target.with_name(f"{target.name}.part")
    with folder_lock(part), disk_errors(part):
        _check_new(target)  # another process may have created it while this one waited for the lock
        for left in part.iterdir():
            if left.name != LOCK:
                left.unlink()
        _check_disk(source, part, quantization)
        try:
            _write(checkpoint, source, part, quantization, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise DoesNotFit(
                f"one layer does not fit in the free memory of {device} ({error}); set LLAMA_DEVICE to cpu"
            ) from error
        mode = (part / "config.json").stat().st_mode
        for path in part.glob("*.safetensors"):
            path.chmod(mode)  # safetensors creates files that only their owner can read
        for path in [*part.iterdir(), part]:
            sync(path)  # before the rename, so that a power failure leaves a complete folder or none
        part.rename(target)
        (target / LOCK).unlink()


def _check_new(target: Path) -> None:
    if target.exists():
        raise BadSettings(f"{target} already exists; use another folder for the packed weights")


def _check_disk(source: Path, part: Path, quantization: Quantization) -> None:
    wanted, free = bytes_of_weights(load_config(source), quantization), shutil.disk_usage(part).free
    if wanted > free:
        raise DiskFull(
            f"the packed weights need {wanted / 1e9:.1f} GB, but the disk of {part} has only "
            f"{free / 1e9:.1f} GB free; free another {(wanted - free) / 1e9:.1f} GB or pack to another disk"
        )


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
        logger.info("packed %s (%d of %d files)", path.name, number, len(checkpoint.files))
    if [path.name for path in checkpoint.files] != [SINGLE]:
        _write_json(part / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _copy_other_files(source, part, quantization)


@torch.inference_mode()
def _packed(
    checkpoint: Checkpoint, path: Path, quantization: Quantization, device: torch.device
) -> dict[str, Tensor]:
    """The tensors of one file on the CPU, with the decoder's linear layers quantized."""
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
    except SafetensorError as error:  # safetensors has no error type of its own for a full disk
        raise DiskFull(f"{path} cannot be written ({error}); free disk space and pack again") from error


def _copy_other_files(source: Path, target: Path, quantization: Quantization) -> None:
    """Copy the tokenizer, the licence and the configuration files, and write `config.json` for the new
    precision."""
    for path in source.iterdir():
        is_replaced = path.suffix == ".safetensors" or path.name in (INDEX, "config.json")
        if path.is_file() and is_read(path.name) and not is_replaced:
            (target / path.name).write_bytes(_read(path))
    config = read_object(source / "config.json")
    config |= {"quantization_config": to_config(quantization), PACKED: quantization}
    _write_json(target / "config.json", config)


def _read(path: Path) -> bytes:
    """Read a small file of the source. Raises BadCheckpoint, so that the error names the source and not the
    target."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadCheckpoint(
            f"{path} cannot be read ({error.strerror}); give this user read permission or copy the file again"
        ) from error


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
