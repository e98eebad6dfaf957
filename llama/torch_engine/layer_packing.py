"""Loads a model and takes it apart. On a CPU, decoder layers are packed while the next ones are read.

A layer is packed directly from the mapped file, so its weights are copied only once. Several layers are
packed at the same time, each on one core: packing one layer after the other on all cores would take longer.
Knows threads; knows nothing about files or kernels.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import local
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from llama.errors import DoesNotFit
from llama.model.loader import load_model
from llama.model.placement import Placement
from llama.torch_engine.layers import Layer, ModelParts, take_apart, take_layer
from llama.torch_engine.linears import Scratch


def load_parts(
    folder: Path, config: LlamaConfig, placement: Placement, beside: Future[Any] | None = None
) -> ModelParts:
    """Load a model and take it apart.

    `beside` is work on another thread that must also succeed. If it fails first, its exception is raised
    without waiting for the model. Raises BadCheckpoint (which names the file or tensor), BadConfig or
    DoesNotFit.
    """
    if placement.device.type != "cpu":
        if beside is not None:
            beside.result()
        return take_apart(load_model(folder, config, placement), placement)
    threads = torch.get_num_threads()
    packer = _Packer(placement.arithmetic, min(threads, _MOST_AT_ONCE), beside)
    try:
        model = load_model(folder, config, placement, packer.take)
        layers = packer.finish()
    finally:
        packer.close()
        torch.set_num_threads(threads)  # the packer's threads have set it to 1 for new threads
    return take_apart(model, placement, layers)


# Every thread has memory for the largest weight of a layer, 1.9 GB for the 70B in float32.
_MOST_AT_ONCE = 4


class _Packer:
    """Packs `at_once` layers at a time, each on one thread."""

    def __init__(self, arithmetic: torch.dtype, at_once: int, beside: Future[Any] | None) -> None:
        self._arithmetic, self._at_once, self._beside = arithmetic, at_once, beside
        self._pool = ThreadPoolExecutor(at_once, "llama-packer", torch.set_num_threads, (1,))
        self._of_thread = local()
        self._layers: dict[int, Future[Layer]] = {}

    def take(self, layers: nn.ModuleList, index: int) -> None:
        """Start to pack a layer. Wait if too many are being packed, so that few weights stay mapped."""
        if self._beside is not None and self._beside.done():
            self._beside.result()
        self._layers[index] = self._pool.submit(self._pack, layers, index)
        waiting = [layer for layer in self._layers.values() if not layer.done()]
        if len(waiting) > self._at_once:
            waiting[0].result()

    def finish(self) -> list[Layer]:
        """Wait for all layers and return them. If packing a layer has failed, raise its exception."""
        return [self._layers[index].result() for index in sorted(self._layers)]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _pack(self, layers: nn.ModuleList, index: int) -> Layer:
        if not hasattr(self._of_thread, "scratch"):
            self._of_thread.scratch = Scratch()
        scratch: Scratch = self._of_thread.scratch
        try:
            return take_layer(layers, index, self._arithmetic, scratch)
        except RuntimeError as error:  # from torch's allocator or oneDNN
            raise DoesNotFit(
                f"decoder layer {index} cannot be packed ({error}); free some memory, or use a smaller model"
            ) from error
