"""Counts the bytes of CUDA memory that fake tensors would use.

Every storage counts from its creation to its end, rounded as torch's allocator rounds. The temporary memory of
operators counts as in `kernel_costs.temporary_bytes`; the workspaces of cuBLAS do not count. Knows storages; knows
nothing about the engine.
"""

# mypy: disable-error-code="no-untyped-call"
# Many internals of torch have no types.

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from fake_cuda.kernel_costs import H100, Card, Op, temporary_bytes
from fake_cuda.patches import OpOverload
from fake_cuda.trace import CudaDispatch, place_in_engine, tensors_in

_ROUND_UP = 512  # CUDACachingAllocator.cpp


class Memory(CudaDispatch):
    def __init__(self, card: Card = H100) -> None:
        super().__init__()
        self._card = card
        self.now = 0
        """The bytes of all storages that exist."""
        self.peak = 0
        """The largest value of `now` since `start_phase`."""
        self.peak_at = ""
        """The operator and place that reached the peak."""
        self._sizes: dict[int, int] = {}

    def start_phase(self) -> int:
        """Measure a new peak from now on. Return the bytes in use."""
        self.peak, self.peak_at = self.now, ""
        return self.now

    def ran(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        outputs = [tensor for tensor in tensors_in(result) if tensor.device.type == "cuda"]
        for tensor in outputs:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = -(-storage.nbytes() // _ROUND_UP) * _ROUND_UP
                self.now += self._sizes[key]
                weakref.finalize(storage, self._ended, key)
        if outputs:
            op = Op(str(func).removeprefix("aten."), tensors_in((args, kwargs)), outputs, self._card)
            if (used := self.now + temporary_bytes(op)) > self.peak:
                self.peak, self.peak_at = used, f"{op.name} {list(outputs[0].shape)} at {place_in_engine()}"

    def _ended(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
